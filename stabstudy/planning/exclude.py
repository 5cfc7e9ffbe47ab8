"""The language of `sweep.exclude`: which cells of the grid are left out.

    model.depth == 10 and optim.lr > 3e-3
    data in ('dclm', 'c4') or not optim.clip == null
    seed != 0 and train.batch_size >= 64

Settings under their dotted names, groups as the name of their preset, `seed`; comparisons (chained too), `in`, `and`,
`or`, `not`, brackets, numbers, text, null, true, false. The text is parsed by Python's own parser and walked here:
nothing is evaluated that is not on this list. An order comparison with null is false.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy.config import CURRENT_NAMES, GROUPS, setting_names
from stabstudy.settings import ConfigError, Problem, nearest

MAX_LENGTH = 500

_EQUAL: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {ast.Eq: operator.eq, ast.NotEq: operator.ne}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CONSTANTS = {"null": None, "true": True, "false": False}


@dataclass(frozen=True)
class Expression:
    """A checked condition: its text, the names it reads, and its tree."""

    text: str
    names: frozenset[str]
    tree: ast.expr

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a trial. `values`: every name of `known_names`."""
        return bool(_value(self.tree, values))


def known_names() -> list[str]:
    """What a condition may name: every setting, every group, seed."""
    return [*setting_names(), *GROUPS]


def parse(text: str) -> Expression:
    """The text as an Expression. Raises ConfigError that names what is not in the language."""
    if len(text) > MAX_LENGTH:
        raise ConfigError(Problem("sweep.exclude", f"a condition has at most {MAX_LENGTH} characters", str(len(text))))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `1 is 1` and `3in x` warn; both are refused or harmless below
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(Problem("sweep.exclude", "is not a condition", repr(text))) from error
    problems: list[Problem] = []
    names: set[str] = set()
    _check(tree, text, names, problems)
    if not problems and not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
        problems.append(Problem("sweep.exclude", "a condition compares something", repr(text)))
    if problems:
        raise ConfigError(problems)
    return Expression(text, frozenset(names), tree)


def _check(node: ast.expr, text: str, names: set[str], problems: list[Problem]) -> None:
    """Note every name, and a Problem for everything that is not in the language."""
    dotted = _dotted(node)
    if dotted is not None:
        if dotted in _CONSTANTS:
            return
        names.add(dotted)
        if dotted not in known_names():
            problems.append(Problem("sweep.exclude", f"{dotted} is not a setting{_near(dotted)}", repr(text)))
        return
    for child in _parts(node):
        if child is None:
            problems.append(Problem("sweep.exclude", f"{_spelling(node)} is not allowed in a condition", repr(text)))
        else:
            _check(child, text, names, problems)


def _near(dotted: str) -> str:
    if dotted in CURRENT_NAMES:
        return f" (did you mean {CURRENT_NAMES[dotted]}?)"
    known = known_names()
    same_key = [name for name in known if name.rpartition(".")[2] == dotted.rpartition(".")[2]]
    return f" (did you mean {', '.join(same_key)}?)" if same_key else nearest(dotted, known)


def _parts(node: ast.expr) -> list[ast.expr | None]:
    """The operands of an allowed node; [None] for any other."""
    if isinstance(node, ast.BoolOp):
        return list(node.values)
    if isinstance(node, ast.Compare) and all(map(_is_allowed, node.ops, node.comparators)):
        return [node.left, *node.comparators]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return [node.operand]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _is_number(node.operand):
        return []
    if isinstance(node, ast.Tuple | ast.List):
        return list(node.elts)
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str | None):
        return []
    return [None]


def _is_allowed(op: ast.cmpop, right: ast.expr) -> bool:
    """`in` needs a list on its right: `data in 'dclm'` would ask for a part of the text."""
    if isinstance(op, ast.In | ast.NotIn):
        return isinstance(right, ast.Tuple | ast.List)
    return type(op) in _EQUAL or type(op) in _ORDER


def _is_number(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _spelling(node: ast.expr) -> str:
    text = ast.unparse(node)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _dotted(node: ast.expr) -> str | None:
    """'optim.lr' for the attribute chain, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        below = _dotted(node.value)
        return None if below is None else f"{below}.{node.attr}"
    return None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    dotted = _dotted(node)
    if dotted is not None:
        return _CONSTANTS[dotted] if dotted in _CONSTANTS else values[dotted]
    match node:
        case ast.BoolOp(op=ast.And()):
            return all(_value(part, values) for part in node.values)
        case ast.BoolOp():
            return any(_value(part, values) for part in node.values)
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, values)
        case ast.UnaryOp():
            return -_value(node.operand, values)
        case ast.Tuple() | ast.List():
            return tuple(_value(part, values) for part in node.elts)
        case ast.Compare():
            terms = [_value(part, values) for part in (node.left, *node.comparators)]
            return all(_compare(op, a, b) for op, a, b in zip(node.ops, terms, terms[1:], strict=False))
        case ast.Constant():
            return node.value
    raise AssertionError(f"not checked: {ast.dump(node)}")


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    if type(op) in _EQUAL:
        return _EQUAL[type(op)](left, right)
    if type(op) not in _ORDER:
        return (left in right) is isinstance(op, ast.In)
    try:
        return left is not None and right is not None and _ORDER[type(op)](left, right)
    except TypeError as error:
        got = f"{left!r} and {right!r}"
        raise ConfigError(Problem("sweep.exclude", "compares values of different kinds", got)) from error
