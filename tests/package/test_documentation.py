"""The documentation: Python code runs, `keye-kernels` commands have valid options, links have targets.

`mkdocs build --strict` checks the links inside docs/. tests/examples checks the outputs in docs/examples.md.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from keye_kernels import cli
from keye_kernels.small import ASSETS

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILES = [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("tests/**/*.md")]

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"\bkeye-kernels (?=[a-z])([^&;>|#\n]*)")
PAGES_WITH_COMMANDS = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAGES_WITH_CODE = ("README.md", "docs/generation.md", "docs/video.md", "docs/operators.md")
# Runs the code blocks of each page in one namespace, and prints what they print as {page: output}
RUN_PAGES = """
import contextlib, io, json, sys

printed = {}
for page, blocks in json.load(sys.stdin).items():
    namespace, output = {"__name__": page}, io.StringIO()
    with contextlib.redirect_stdout(output):
        for line, code in blocks:
            exec(compile("\\n" * line + code, page, "exec"), namespace)
    printed[page] = output.getvalue()
print(json.dumps(printed))
"""


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(number of lines before the code, code) of each code block in the language."""
    text = page.read_text(encoding="utf-8")
    found = (match for match in BLOCK.finditer(text) if match[1] == language)
    return [(text[: match.start(2)].count("\n"), match[2]) for match in found]


def commands() -> list[str]:
    """The `keye-kernels` commands in shell blocks."""
    shell = [code for page in PAGES_WITH_COMMANDS for _, code in blocks(page, "bash")]
    return sorted({command.strip() for code in shell for command in COMMAND.findall(code)})


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    pytest.importorskip("transformers", reason="README.md shows transformers' Auto classes")
    pages = {page: blocks(ROOT / page, "python") for page in PAGES_WITH_CODE}
    assert all(pages.values())
    done = subprocess.run(
        [sys.executable, "-c", RUN_PAGES], input=json.dumps(pages), cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_code_of_the_readme_answers_both_questions(printed):
    questions = json.loads((ASSETS / "questions.json").read_text(encoding="utf-8"))
    answers = [
        answer for pairs in questions.values() for question, answer in pairs if question in (ROOT / "README.md").read_text()
    ]
    assert printed["README.md"].splitlines()[:2] == answers


def test_code_of_the_guides_prints_the_documented_results(printed):
    # The streamed answer has no line break. After it, tokens per step with prompt lookup
    assert printed["docs/generation.md"].startswith("three1.15\n3.00\nthree\n")
    assert printed["docs/video.md"].startswith("[tensor([0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.int32)]")


@pytest.mark.parametrize("command", commands())
def test_documented_command_has_valid_options(command):
    cli._parser().parse_args(shlex.split(command))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_relative_links_have_a_target(file):
    for link in LINK.findall(file.read_text(encoding="utf-8")):
        if ":" in link:
            continue  # https, mailto
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), f"{file.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{file.name} links to {link}"
