"""Runs chat templates, which are untrusted code: no access to Python objects, and limits on steps, numbers and lengths."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Loop iterations and calls of one prompt. A conversation takes a few per message part.
MAX_STEPS = 1_000_000
# Of a prompt and of each string and list that a template builds; a context of 131072 tokens has about 600,000 characters.
MAX_LENGTH = 10_000_000
MAX_INTEGER_BITS = 4096
# A width of 5 or more digits, or one taken from the arguments, in a format string such as "%05d"
LARGE_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a template; raises ValueError if it is not valid, raises an error or exceeds a limit."""
    template, _ = _compile(source)
    token = _steps_left.set([MAX_STEPS])
    try:
        return _join(template.generate(**variables))
    # Filters, operators and methods raise errors of all kinds.
    except Exception as error:
        raise ValueError(f"the chat template failed: {error or type(error).__name__}") from error
    finally:
        _steps_left.reset(token)


def template_variables(source: str) -> frozenset[str]:
    """Returns the names of the variables that a template uses; raises ValueError if it is not valid."""
    return _compile(source)[1]


class _LimitedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _AddLimits().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _count_steps(1)
        return super().call(context, function, *args, **kwargs)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        return _join(pieces)


class _AddLimits(NodeTransformer):
    """Counts the iterations of loops, and limits the length of the results of `~`."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "count_items", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        items = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(items, "join_limited", [], [], None, None, lineno=node.lineno)


@lru_cache(maxsize=8)
def _compile(source: str) -> tuple[Template, frozenset[str]]:
    # The same settings as in transformers, for which chat templates are written.
    environment = _LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters |= {"tojson": _tojson, "count_items": _count_items, "join_limited": _join}
    environment.globals |= {"raise_exception": _raise_exception, "range": _range}
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source), frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template is not valid: {error}") from error


def _count_steps(steps: int) -> None:
    left = _steps_left.get()
    left[0] -= steps
    if left[0] < 0:
        raise TemplateError(f"it takes more than {MAX_STEPS} steps")


def _count_items(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count_steps(1)
        yield item


def _range(*args: int) -> range:
    values = range(*args)
    _count_steps(len(values))
    return values


def _join(pieces: Iterable[Any]) -> str:
    texts, length = [], 0
    for piece in pieces:
        texts.append(str(piece))
        length += len(texts[-1])
        _check_length(length)
    return "".join(texts)


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateError(f"it builds a text or a list of more than {MAX_LENGTH} characters or entries")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise TemplateError(f"it computes an integer of more than {MAX_INTEGER_BITS} bits")
    elif operator == "*":
        for count, sequence in ((left, right), (right, left)):
            if isinstance(count, int) and isinstance(sequence, Sized):
                _check_length(count * len(sequence))
    elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
        _check_length(len(left) + len(right))
    elif operator == "%" and isinstance(left, str) and LARGE_WIDTH.search(left):
        raise TemplateError(f"it formats with a width that is too large: {left[:40]!r}")


def _tojson(value: Any, **options: Any) -> str:
    # Jinja's built-in filter escapes HTML characters.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
