"""`apply_keye_kernels` and `revert_keye_kernels`.

A patched module has one additional instance attribute: a bound method `forward`, made from a function of this package. This
function also identifies the replaced parts, so no other state is kept, and a copy of a patched model is patched too.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType

from torch import nn

from .families import RULES, PatchRule
from .report import ModuleReport, Part, PatchReport, grouped_lines

PACKAGE = __name__.partition(".")[0]
# Modules of unknown classes are reported if their class name matches
REPORTED_NAMES: dict[Part, str] = {"rope": "Rotary|RoPE|Rope", "attention": "Attention", "projector": "Projector|PatchMerger"}
_parts_of: dict[Callable, frozenset[Part]] = {}


@dataclass
class KnownModule:
    """A module with a class that has a `PatchRule`."""

    name: str
    module: nn.Module
    rule: PatchRule

    @property
    def rope_part(self) -> Part:
        """The part that makes this module exchange positions. Keye's own vision attention is replaced as a whole."""
        return "rope" if "rope" in self.rule.parts else "attention"

    def report(self, part: Part, note: str, missing: bool = False) -> ModuleReport:
        return ModuleReport(self.name, type(self.module).__name__, part, note, missing)


def apply_keye_kernels(
    model: nn.Module,
    *,
    rope: bool = True,
    attention: bool = True,
    projector: bool = True,
    elementwise: bool = True,
    strict: bool = False,
) -> PatchReport:
    """Makes a loaded model run this package's operators.

    Only this instance changes, not its class or weights. A second call returns the same report; other flags add parts.
    `with apply_keye_kernels(model):` reverts at the end of the block. `docs/patching.md` says what is replaced in which model.

    Args:
        model: Keye (the remote code), or PaddleOCR-VL, Qwen2-VL, Qwen2.5-VL or Qwen3-VL of transformers; also a part of one, or
            a module that contains one (a compiled module, for example).
        rope: replace rope with `rope_2d` in the vision tower and `rope_3d` in the text model.
        attention: replace attention with `varlen_attention` in the vision tower. Text attention is never replaced.
        projector: replace the projector with `patch_merge_projection`.
        elementwise: replace residual add + norm, and the activations of MLPs, by fused kernels. They run without gradients only.
        strict: raise if a requested part cannot be replaced, and change nothing. Default: report it.

    Returns:
        What was replaced, and what was left alone and why.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: with `strict`, if a requested part cannot be replaced. The message lists all of them.
    """
    flags: dict[Part, bool] = {"rope": rope, "attention": attention, "projector": projector, "elementwise": elementwise}
    requested = {part for part, flag in flags.items() if flag}
    known, unknown = find_modules(model)
    obstacles = find_obstacles(known, unknown, requested)

    replaced, left_alone, changes = [], [], []
    for item in known:
        before = patched_parts(item.module)
        after = before | {part for part in requested & item.rule.parts.keys() if (item.name, part) not in obstacles}
        for part, note in item.rule.parts.items():
            if part in after:
                replaced.append(item.report(part, note))
            else:
                reason = obstacles.get((item.name, part), f"not requested ({part}=False)")
                left_alone.append(item.report(part, reason, missing=part in requested))
        left_alone += [item.report(part, reason) for part, reason in item.rule.kept.items()]
        if after != before:
            changes.append((item, after - before))
    left_alone += [report for report in unknown if not report.missing or report.part in requested]

    missing = [report for report in left_alone if report.missing]
    if strict and missing:
        listed = "\n  ".join(grouped_lines(missing))
        raise ValueError(f"strict=True, but these requested parts of {type(model).__name__} cannot be replaced:\n  {listed}")
    # Modules of this package are reported as unknown, but not as missing
    if strict and not replaced and all(report.missing for report in unknown):
        raise ValueError(f"strict=True, but nothing in {type(model).__name__} can be replaced")
    for item, added in changes:
        set_parts(item, patched_parts(item.module) | added)

    def undo() -> None:
        # Rope is reverted in a whole group, also where another call replaced it
        groups = {item.rule.rope_group for item, added in changes if item.rope_part in added} - {None}
        for item in known:
            if item.rule.rope_group in groups:
                set_parts(item, patched_parts(item.module) - {"rope"})
        for item, added in changes:
            set_parts(item, patched_parts(item.module) - added)
        # A second use of the report must not revert the changes of later calls
        changes.clear()

    return PatchReport(type(model).__name__, tuple(replaced), tuple(left_alone), undo)


def revert_keye_kernels(model: nn.Module) -> None:
    """Reverts everything that `apply_keye_kernels` replaced in `model`. Does nothing if the model is not patched.

    Args:
        model: the module that was passed to `apply_keye_kernels`, one that contains it, or a part that can be reverted alone.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: `model` is a part that exchanges positions with the rest. Nothing is changed.
    """
    known, _ = find_modules(model)
    for group in {item.rule.rope_group for item in known} - {None}:
        producers, consumers = _rope_producers_and_consumers([item for item in known if item.rule.rope_group == group])
        for one_side, other_side in ((producers, consumers), (consumers, producers)):
            if not other_side and any("rope" in patched_parts(item.module) for item in one_side):
                got = f"{type(model).__name__}, which exchanges positions with modules outside of it"
                raise ValueError(f"model must be the module that was passed to apply_keye_kernels, got {got}")
    for item in known:
        set_parts(item, frozenset())


def find_modules(model: nn.Module) -> tuple[list[KnownModule], list[ModuleReport]]:
    """The modules of known classes, and reports of other modules with class names that suggest rope, attention or projector."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    known, unknown = [], []
    # Unknown modules below these names belong to a module that is already reported
    reported: tuple[str, ...] = ()
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if class_name not in RULES and name.startswith(reported):
            continue
        is_own = type(module).__module__.partition(".")[0] == PACKAGE
        if class_name in RULES and not is_own:
            known.append(KnownModule(name, module, RULES[class_name]))
            covers_submodules = not RULES[class_name].parts
        else:
            note = f"part of {PACKAGE}, already runs kk.ops" if is_own else "its class is unknown"
            parts = [part for part, pattern in REPORTED_NAMES.items() if re.search(pattern, class_name)]
            unknown += [ModuleReport(name, class_name, part, note, missing=not is_own) for part in parts]
            covers_submodules = bool(parts)
        if covers_submodules:
            reported += (f"{name}.",)
    return known, unknown


def find_obstacles(known: list[KnownModule], unknown: list[ModuleReport], requested: set[Part]) -> dict[tuple[str, Part], str]:
    """Maps (module name, part) to the reason, for each part that is requested, not yet replaced, and cannot be replaced."""
    obstacles = {}
    for item in known:
        for part in (requested & item.rule.parts.keys()) - patched_parts(item.module):
            if reason := _foreign_forward(item.module) or item.rule.obstacle(item.module, part):
                obstacles[item.name, part] = reason
    if "rope" in requested:
        for group in {item.rule.rope_group for item in known} - {None}:
            members = [item for item in known if item.rule.rope_group == group]
            if reason := _group_obstacle(members, unknown, obstacles, requested):
                for item in members:
                    if "rope" in item.rule.parts.keys() - patched_parts(item.module):
                        obstacles.setdefault((item.name, "rope"), reason)
    return obstacles


def _rope_producers_and_consumers(members: list[KnownModule]) -> tuple[list[KnownModule], list[KnownModule]]:
    """The modules of a rope group that produce positions, and those that consume them."""
    consumers = [item for item in members if not item.rule.produces_positions]
    # A rotary module inside an attention layer is not used: the layer gets its positions from the model
    inside = tuple(f"{item.name}." if item.name else "" for item in consumers)
    producers = [item for item in members if item.rule.produces_positions and not item.name.startswith(inside)]
    return producers, consumers


def _group_obstacle(members: list[KnownModule], unknown: list[ModuleReport], obstacles: dict, requested: set[Part]) -> str | None:
    """The reason why positions cannot be passed from the producers of a rope group to its consumers, or None."""
    producers, consumers = _rope_producers_and_consumers(members)
    if not producers or not consumers:
        return f"no module of a known class {'produces' if consumers else 'consumes'} its positions"
    for item in members:
        part = item.rope_part
        if (item.name, part) in obstacles:
            return f"{item.name or 'the model itself'} cannot be replaced: {obstacles[item.name, part]}"
        if part not in requested and part not in patched_parts(item.module):
            return f"rope_2d runs inside the replaced attention of this model: pass {part}=True as well"
    parents = tuple(producer.name.rpartition(".")[0] for producer in producers)
    for report in unknown:
        if report.missing and report.part == "attention" and report.module.startswith(parents):
            return f"{report.module} would receive the positions, and its class is unknown"
    return None


def _forward_attribute(module: nn.Module) -> str:
    """The attribute that holds the module's forward: accelerate's hooks replace `forward` and keep the original here."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def _instance_forward(module: nn.Module) -> Callable | None:
    """The function behind the instance's forward, or None if the class's forward runs."""
    forward = module.__dict__.get(_forward_attribute(module))
    function = forward.__func__ if inspect.ismethod(forward) else forward
    return None if function is type(module).forward else function


def patched_parts(module: nn.Module) -> frozenset[Part]:
    """The parts of `module` that are replaced."""
    function = _instance_forward(module)
    return frozenset() if function is None else _parts_of.get(function, frozenset())


def _foreign_forward(module: nn.Module) -> str | None:
    """The reason not to patch a module with a forward that other code replaced, or None."""
    function = _instance_forward(module)
    if function is None or function in _parts_of:
        return None
    return f"its forward was already replaced by {getattr(function, '__qualname__', function)}"


def set_parts(item: KnownModule, parts: frozenset[Part]) -> None:
    """Gives the module the forward with `parts` replaced, or the forward of its class if `parts` is empty."""
    module, attribute = item.module, _forward_attribute(item.module)
    if parts == patched_parts(module):
        return
    if parts:
        function = item.rule.make_forward(module, parts)
        _parts_of[function] = parts
        setattr(module, attribute, MethodType(function, module))
    elif attribute == "forward":
        del module.forward
    else:
        module._old_forward = MethodType(type(module).forward, module)
