"""Jinja programs of strangers: a sandbox that bounds their steps and the size of whatever they make.

    source ──► nodes ──`_Meter`──► nodes that count what repeats and weigh what grows ──► Jinja's code ──► text

Jinja's own sandbox keeps templates from Python's internals, not from `'a' * 10**10`, from loops in loops or from lists
that hold one another 2^60 times. Here nothing is done without being paid for from a `StepBudget`: the body of a loop,
macro or block by its nodes, each time; what is made by its weight, as a tree; what may grow beyond its arguments,
before it is made. No clock and no process is needed, so a template that passes on one machine passes on all.
"""

# ruff: noqa: N802, N805, N815 - Jinja's own names: visitors are called after the nodes that they visit

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from json import JSONEncoder
from string import Formatter
from types import MethodType
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import make_attrgetter
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner
from jinja2.visitor import NodeTransformer

MOST_SOURCE = 1 << 18  # characters of a template; real ones have some 20,000
CHARACTERS = 4  # of text that weigh as much as a value
CALL = 4  # what a call weighs beyond its arguments
MOST_BITS = 4096  # of an integer

_TICK, _WEIGH, _CONCAT = "#tick", "#weigh", "#concat"  # filters that `_Meter` puts in; no template can spell them
_LEFT_OUT = frozenset(["pprint", "striptags", "urlize", "wordwrap", "xmlattr"])  # for pages, with loops of their own


class StepBudget:
    """What a template may still do. `work` is in nodes of a template; values weigh one each, text by its length."""

    def __init__(self, *, work: int, most_text: int) -> None:
        self._work, self._left, self._most_text = work, work, most_text

    def spend(self, work: int) -> None:
        """Take steps from what is left.

        Raises:
            SecurityError: there are no more.
        """
        self._left -= work
        if self._left < 0:
            raise SecurityError(f"it takes more than {self._work} steps")

    def allow(self, characters: int) -> None:
        """Refuse a text that would be too long, before it is made."""
        if characters > self._most_text:
            raise SecurityError(f"it makes a text of more than {self._most_text} characters")

    def weigh(self, value: Any) -> Any:
        """Pay for a value and all that it holds, however often it holds the same; returns it."""
        pending = [value]
        while pending:
            held = pending.pop()
            work = 1
            if isinstance(held, str):
                self.allow(len(held))
                work += len(held) // CHARACTERS
            elif isinstance(held, int) and held.bit_length() > MOST_BITS:
                raise SecurityError(f"it makes a number of more than {MOST_BITS} bits")
            elif isinstance(held, list | tuple):
                pending += held
            elif isinstance(held, dict):
                pending += [*held, *held.values()]
            self.spend(work)
        return value

    def counted(self, values: Iterator[Any]) -> Iterator[Any]:
        """The same values, each paid for as it comes."""
        for value in values:
            self.spend(1)
            yield value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja with `functions` beside its own; everything that a template does is paid for from `budget`.

    It serves one rendering.

    Raises:
        SecurityError: from a template that asks for too much; a TemplateError.
    """

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, budget: StepBudget, functions: Mapping[str, Callable[..., Any]], **options: Any) -> None:
        super().__init__(optimized=False, finalize=budget.weigh, **options)
        self.budget = budget
        del self.globals["lipsum"]
        self.globals.update(functions)
        filters = {**self.filters, "join": self._join, "tojson": self._to_json}
        self.filters = {name: self._metered(name, filters[name]) for name in filters.keys() - _LEFT_OUT}
        self.filters |= {_TICK: self._tick, _WEIGH: budget.weigh, _CONCAT: self._join}
        self.tests = {name: self._metered_test(test) for name, test in self.tests.items()}

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        """Jinja's hook between its nodes and its code."""
        metered = _Meter().visit(source)
        metered.set_environment(self)
        return super()._generate(metered, *arguments, **options)

    def _tick(self, work: int) -> bool:
        self.budget.spend(work)
        return True

    def concat(self, pieces: Iterable[str]) -> str:
        """What a template, a macro or a block has written, as one text."""
        written, length = [], 0
        for piece in pieces:
            length += len(piece)
            self.budget.allow(length)
            written.append(piece)
        self.budget.spend(length // CHARACTERS)
        return "".join(written)

    def _join(self, values: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        """Jinja's filter `join`, piece by piece."""
        if attribute is not None:
            values = map(make_attrgetter(self, attribute), values)
        between = str(d)
        return self.concat(
            piece for n, value in enumerate(values) for piece in (between if n else "", str(self.budget.weigh(value)))
        )

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """What transformers has for Jinja's filter, which would escape what means something in HTML."""
        if isinstance(indent, int):
            self.budget.allow(indent)
        encoder = JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(encoder.iterencode(self.budget.weigh(value)))

    def _made(self, value: Any) -> Any:
        return self.budget.counted(value) if isinstance(value, Iterator) else self.budget.weigh(value)

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        growth, passed = _FILTERS.get(name), int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            operands = args[passed:]
            self.budget.spend(CALL + sum(map(_length, (*operands, *kwargs.values()))))
            if growth is not None:
                self.budget.weigh([*operands[1:], *kwargs.values()])
                self.budget.allow(growth(*operands, **kwargs))
            return self._made(function(*args, **kwargs))

        return metered

    def _metered_test(self, test: Any) -> Callable[..., Any]:
        @wraps(test)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend(CALL)
            if len(args) > 1:
                self.budget.weigh(args)  # it compares
            return test(*args, **kwargs)

        return metered

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = __self._method(__obj)
        if method is not None:
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        __self.budget.spend(CALL + sum(map(_length, (*args, *kwargs.values()))))
        if method is not None:
            __self.budget.spend(_length(__obj.__self__))
            __self.budget.allow(method(__obj.__self__, *args, **kwargs))
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def _method(self, called: Any) -> Callable[..., int] | None:
        """How long a text becomes that a method of a value makes; None for what is the template's, or a function.

        Raises:
            SecurityError: it is anything else.
        """
        if isinstance(called, self.undefined):
            return None  # and says so as it is called
        owner, name = getattr(called, "__self__", None), getattr(called, "__name__", type(called).__name__)
        for kind, names in _METHODS.items():
            if isinstance(owner, kind) and name in names:
                return names[name]
        holder = owner if isinstance(called, MethodType) else called
        known = (Macro, LoopContext, BlockReference, Cycler, Joiner, _Format)
        if isinstance(holder, known) or any(holder is function for function in self.globals.values()):
            return None
        raise SecurityError(f"templates may not call {name!r}")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.weigh([left, right] if isinstance(left, str) else None)
        if operator in _OPERATORS:
            self.budget.allow(_OPERATORS[operator](left, right))
        return self.budget.weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        method = super().wrap_str_format(value)
        return None if method is None else _Format(method, value.__self__, self.budget)


class _Meter(NodeTransformer):
    """Puts filters that count and weigh around what repeats, and around what grows without one."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self._ticking(node)
        if node.test is not None:
            node.test = nodes.And(_tick(node.test), node.test)
        return node

    def _ticking(self, node: Any) -> Any:
        tick = _tick(node)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, _WEIGH)
        for operand in node.ops:
            operand.expr = _filter(operand.expr, _WEIGH)
        return node

    def _weighed(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH)

    visit_List = visit_Dict = _weighed

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, _WEIGH) if isinstance(node.arg, nodes.Slice) else node

    def visit_ScopedEvalContextModifier(self, _: nodes.Node) -> nodes.Node:
        raise SecurityError("it turns on the escaping of HTML")


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _tick(node: nodes.Node) -> nodes.Filter:
    """Pays for all nodes below a node."""
    return _filter(nodes.Const(1 + sum(1 for _ in node.find_all(nodes.Node)), lineno=node.lineno), _TICK)


class _Format:
    """`str.format` of a text, within bounds."""

    def __init__(self, method: Callable[..., str], text: str, budget: StepBudget) -> None:
        self._method, self._text, self._budget = method, text, budget

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        specs = [spec or "" for _, name, spec, _ in Formatter().parse(self._text) if name is not None]
        self._budget.allow(_formatted(self._text, specs, self._budget.weigh([args, kwargs])))
        return self._method(*args, **kwargs)


def _formatted(text: str, specs: Sequence[str], values: Any) -> int:
    """Most characters of a text with some specifications, each of them all values long and as wide as it asks for."""
    if any(mark in spec for spec in specs for mark in "{*"):
        raise SecurityError("it formats with a width that another value gives")
    widths = [int(digits[:9]) for spec in specs for digits in re.findall(r"\d+", spec)]
    return len(text) + sum(widths) + len(specs) * len(str(values))


def _percent(text: Any, values: Any) -> int:
    if not isinstance(text, str):
        return 0
    return _formatted(text, re.findall(r"%(?:\([^)]*\))?([-#0 +.*\d]*)", text), values)


def _repeated(left: Any, right: Any) -> int:
    text, times = (right, left) if isinstance(left, int) else (left, right)
    return len(text) * times if isinstance(times, int) and isinstance(text, str | list | tuple) else 0


def _power(base: Any, exponent: Any) -> int:
    whole = isinstance(base, int) and isinstance(exponent, int)
    if whole and base.bit_length() * exponent > MOST_BITS:
        raise SecurityError(f"it makes a number of more than {MOST_BITS} bits")
    return 0


def _replaced(text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
    return len(str(text)) + str(text).count(str(old)) * len(str(new))


def _indented(text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
    step: int = width if isinstance(width, int) else len(width)
    return len(str(text)) + step * (1 + len(str(text).splitlines()))


def _joined(between: str, pieces: Sequence[str]) -> int:
    return sum(len(between) + len(piece) for piece in pieces)


def _wide(text: Any, width: int = 80, *_: Any, **__: Any) -> int:
    return len(text) + width


def _filled(values: Any, count: int, *_: Any, **__: Any) -> int:
    return abs(count)


def _rounded(value: Any, precision: int = 0, *_: Any, **__: Any) -> int:
    return _power(10, abs(precision))


def _summed(values: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise SecurityError("it sums what are no numbers")
    return 0


def _as_long(value: Any, *_: Any, **__: Any) -> int:
    return 0


def _length(value: Any) -> int:
    """What going through a value once costs."""
    if isinstance(value, str):
        return len(value) // CHARACTERS
    return len(value) if isinstance(value, list | tuple | dict | range) else 1


# The length of the text, or list, that is made from some arguments.
_OPERATORS = {"*": _repeated, "**": _power, "%": _percent}
_FILTERS: dict[str, Callable[..., int]] = {
    "batch": _filled,
    "center": _wide,
    "format": lambda text, *args, **kwargs: _percent(str(text), (args, kwargs)),
    "indent": _indented,
    "replace": _replaced,
    "round": _rounded,
    "slice": _filled,
    "sum": _summed,
}
_PLAIN = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
    *("isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "lower"),
    *("lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rsplit", "rstrip"),
    *("split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
_METHODS: dict[type, dict[str, Callable[..., int]]] = {
    str: {
        **dict.fromkeys(_PLAIN, _as_long),
        "center": _wide,
        "join": _joined,
        "ljust": _wide,
        "replace": _replaced,
        "rjust": _wide,
        "zfill": _wide,
    },
    dict: dict.fromkeys(("copy", "get", "items", "keys", "values"), _as_long),
    list: dict.fromkeys(("copy", "count", "index"), _as_long),
    tuple: dict.fromkeys(("count", "index"), _as_long),
}
