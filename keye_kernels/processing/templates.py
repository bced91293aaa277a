"""Runs chat templates, which are untrusted code: no access to Python objects, and limits on time, steps, numbers and lengths."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, partial, wraps
from typing import Any

from jinja2 import Environment, Template, TemplateError, meta, nodes, pass_environment
from jinja2.ext import loopcontrols
from jinja2.filters import do_indent, do_round, make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

# Loop iterations, calls and filters of one prompt. A conversation takes a few per message part.
MAX_STEPS = 1_000_000
# Lists that a template builds take a step per entry, and texts one per 1000 characters: all together at most a billion.
CHARACTERS_PER_STEP = 1000
# Checked at each step
MAX_SECONDS = 5.0
# Of a prompt and of each string and list that a template builds; a context of 131072 tokens has about 600,000 characters.
MAX_LENGTH = 10_000_000
MAX_INTEGER_BITS = 4096
MAX_PRECISION = 300  # a float has 308 digits before the point
# A width of 5 or more digits, or one taken from the arguments, in a format string such as "%05d" or "{:05}"
LARGE_WIDTH = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^}]*(\d{5}|\{)")
# Chat templates do not need them, and they build long texts and lists from short ones.
UNAVAILABLE_METHODS = ("center", "expandtabs", "format_map", "ljust", "rjust", "to_bytes", "translate", "zfill")
UNAVAILABLE_FILTERS = ("batch", "center", "pprint", "slice", "urlize", "wordwrap", "xmlattr")

_steps_left: ContextVar[list[float]] = ContextVar("steps_left")  # steps, and the time at which the template is stopped


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Renders a template; raises ValueError if it is not valid, raises an error or exceeds a limit."""
    template, _ = _compile(source)
    token = _steps_left.set([MAX_STEPS, time.monotonic() + MAX_SECONDS])
    try:
        return _join(template.generate(**variables))
    # Filters, operators and methods raise errors of all kinds.
    except Exception as error:
        raise ValueError(f"the chat template failed: {str(error) or type(error).__name__}") from error
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
        return _count_length(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _count_steps(1)
        method = getattr(function, "__wrapped__", function)  # Jinja wraps str.format
        if isinstance(text := getattr(method, "__self__", None), str):
            _count_nested((*args, *kwargs.values()))
            if method.__name__ == "format":
                _check_width(text)
            elif method.__name__ in LIMITED_METHODS:
                function = partial(LIMITED_METHODS[method.__name__], text)
        return _count_length(super().call(context, function, *args, **kwargs))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNAVAILABLE_METHODS and super().is_safe_attribute(obj, attr, value)

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
    environment = _LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], finalize=_text)
    environment.filters |= {"tojson": _tojson, "string": _text, "replace": _replace, "format": _format, "indent": _indent}
    environment.filters |= {"round": _round, "join": _join_filter, "count_items": _count_items, "join_limited": _join}
    kept = environment.filters.keys() - set(UNAVAILABLE_FILTERS)
    environment.filters = {name: _limited(environment.filters[name]) for name in kept}
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": _raise_exception, "range": _range}
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(source), frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except (TemplateError, RecursionError) as error:
        raise ValueError(f"the chat template is not valid: {error}") from error


def _limited(function: Callable) -> Callable:
    """A filter that takes a step, and more for a long result."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _count_steps(1)
        return _count_length(function(*args, **kwargs))

    return run


def _count_steps(steps: int) -> None:
    left = _steps_left.get()
    left[0] -= steps
    if left[0] < 0:
        raise TemplateError(f"it takes more than {MAX_STEPS} steps")
    if time.monotonic() > left[1]:
        raise TemplateError(f"it takes longer than {MAX_SECONDS} seconds")


def _count_items(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _count_steps(1)
        yield item


def _range(*args: int) -> range:
    values = range(*args)
    _count_steps(len(values))
    return values


def _count_length(built: Any) -> Any:
    if isinstance(built, str):
        _count_steps(len(built) // CHARACTERS_PER_STEP)
    elif isinstance(built, (list, tuple, dict, set)):
        _count_steps(len(built))
    return built


def _count_nested(value: Any) -> None:
    """Counts all entries in a value before it becomes text: a list that holds another one twice grows exponentially."""
    pending = [value]
    while pending:
        value = pending.pop()
        _count_steps(1)
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, (list, tuple, set)):
            pending += value


def _text(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple, set)):
        _count_nested(value)
    return str(value)


def _join(pieces: Iterable[Any], separator: str = "") -> str:
    texts, length = [], 0
    for piece in pieces:
        texts.append(_text(piece))
        length += len(texts[-1]) + len(separator)
        _check_length(length)
    return _count_length(separator.join(texts))


@pass_environment
def _join_filter(environment: Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    return _join(value if attribute is None else map(make_attrgetter(environment, attribute), value), str(d))


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = _text(text), _text(old), _text(new)
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _format(text: Any, *args: Any, **kwargs: Any) -> str:
    _check_operands("%", str(text), kwargs or args)
    return str(text) % (kwargs or args)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_length((text.count("\n") + 1) * (len(width) if isinstance(width, str) else width))
    return do_indent(text, width, first, blank)


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > MAX_PRECISION:
        raise TemplateError(f"it rounds to more than {MAX_PRECISION} digits")
    return do_round(value, precision, method)


LIMITED_METHODS: dict[str, Callable] = {"join": lambda separator, items: _join(items, separator), "replace": _replace}


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateError(f"it builds a text or a list of more than {MAX_LENGTH} characters or entries")


def _check_width(pattern: str) -> None:
    if LARGE_WIDTH.search(pattern):
        raise TemplateError(f"it formats with a width that is too large: {pattern[:40]!r}")


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
    elif operator == "%" and isinstance(left, str):
        _count_nested(right)
        _check_width(left)


def _tojson(value: Any, **options: Any) -> str:
    _count_nested(value)
    # Jinja's built-in filter escapes HTML characters.
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
