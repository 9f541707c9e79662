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
from functools import cache
from typing import Any, TypeGuard

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
    module_class: Any = type(module)
    used = _used_as_experts(module_class)
    return {name: used[name] for name in names if name in used}


@cache
def _used_as_experts(module_class: Any) -> dict[str, bool]:
    """Attributes that a class's forward multiplies with in one of the two ways, and in no other."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(module_class.forward)))
    except (OSError, TypeError, SyntaxError):  # no source, or only a part of a statement
        return {}
    ways: dict[str, set[bool | None]] = {}
    understood: set[ast.AST] = set()
    for node in ast.walk(code):
        if (product := _product(node)) is not None:
            weight, transposed = product
            understood.add(weight)
            ways.setdefault(weight.attr, set()).add(transposed)
        elif isinstance(node, ast.Attribute) and node.attr in _ASKED:
            understood.add(node.value)
        elif isinstance(node, ast.Compare) and all(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            understood.add(node.left)  # is it None?
    for node in ast.walk(code):
        if _is_own(node) and node not in understood:
            ways.setdefault(node.attr, set()).add(None)
    return {name: way for name, (way, *others) in ways.items() if way is not None and not others}


def _product(node: ast.AST) -> tuple[ast.Attribute, bool] | None:
    """The attribute of self that a call multiplies with, and whether it is taken as `[in, out]`."""
    if not isinstance(node, ast.Call) or len(node.args) < 2:
        return None
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    weight = node.args[1]
    if function == "linear" and isinstance(weight, ast.Subscript) and _is_own(weight.value):
        return weight.value, False
    return (weight, True) if function == "bmm" and _is_own(weight) else None


def _is_own(node: ast.AST) -> TypeGuard[ast.Attribute]:
    """Whether it is `self.name`."""
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
