"""What a source file of the package depends on, found in its syntax tree without running it."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = "keye_kernels.ops"


def imported_modules(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere, function bodies included.

    A use of `torch.ops.keye_kernels` counts as an import of `keye_kernels.ops`, which registers these operators.
    """
    package = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    return modules_of(ast.parse(file.read_text(encoding="utf-8")), package)


def modules_of(tree: ast.AST, package: list[str]) -> set[str]:
    """`imported_modules` for a syntax tree. Relative imports start at `package`, the parts of a package name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif _uses_operators(node):
            found.add(OPERATORS)
    # `from torch import ops` hides the namespace from the check above
    return found | {OPERATORS} if "torch.ops" in found else found


def _uses_operators(node: ast.AST) -> bool:
    """`torch.ops.keye_kernels`, or `getattr(torch.ops, ...)`, where the namespace is not a literal."""
    if isinstance(node, ast.Attribute):
        return ast.unparse(node) == "torch.ops.keye_kernels"
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and bool(node.args)
        and ast.unparse(node.args[0]) == "torch.ops"
    )


def defines_operators(file: Path) -> bool:
    """Whether a file registers operators: it uses `torch.library`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    uses = any(isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.library" for node in ast.walk(tree))
    return uses or any(module.startswith("torch.library") for module in modules_of(tree, []))
