"""Which parameters of a module hold the matrices of several experts, and how these lie in them.

transformers declares it for most (`use_experts_implementation` sets `is_transposed`). Elsewhere the module's own code
tells, if all that it does with a 3-D parameter is

    linear(x, self.weight[i])    experts [out, in], one after the other
    bmm(x, self.weight)          experts [in, out], all at once
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from functools import cache

from torch import nn

_ASKED = ("shape", "dtype", "device", "ndim", "size", "numel")  # of a parameter, which is no use of its values


def fused_experts(module: nn.Module) -> dict[str, bool]:
    """Names of the 3-D parameters of `module` that hold one matrix per expert, with whether each is `[in, out]`.

    Other 3-D parameters are no experts (the state matrices of a Mamba mixer, for one), or do not say which axis is
    which.
    """
    names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
    if not names:
        return {}
    declared = getattr(module, "is_transposed", None)
    if declared is not None:
        return dict.fromkeys(names, bool(declared))
    used = _used_as_experts(type(module))
    return {name: used[name] for name in names if name in used}


@cache
def _used_as_experts(module_class: type[nn.Module]) -> dict[str, bool]:
    """Attributes that a class's forward multiplies with in one of the two ways only."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(module_class.forward)))
    except (OSError, TypeError, SyntaxError):  # no source, or a part of an expression
        return {}
    ways: dict[str, set[bool]] = {}
    counted: Counter[str] = Counter()
    for node in ast.walk(code):
        if isinstance(node, ast.Call) and (found := _product(node)):
            name, transposed = found
            ways.setdefault(name, set()).add(transposed)
            counted[name] += 1
        elif (name := _own(node)) is not None:
            counted[name] -= 1
        elif isinstance(node, ast.Attribute) and node.attr in _ASKED and (name := _own(node.value)) is not None:
            counted[name] += 1
        elif isinstance(node, ast.Compare) and (name := _own(node.left)) is not None:  # with None
            counted[name] += 1
    return {name: found.pop() for name, found in ways.items() if len(found) == 1 and counted[name] == 0}


def _product(call: ast.Call) -> tuple[str, bool] | None:
    """The attribute of self that a call multiplies with, and whether it is one of `[in, out]`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if len(call.args) < 2 or function not in ("linear", "bmm"):
        return None
    weight = call.args[1]
    if function == "bmm":
        name = _own(weight)
    else:
        name = _own(weight.value) if isinstance(weight, ast.Subscript) else None
    return None if name is None else (name, function == "bmm")


def _own(node: ast.AST) -> str | None:
    """`name` of an expression `self.name`."""
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) else None
