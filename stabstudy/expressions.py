"""The language of conditions: which cells `sweep.exclude` leaves out, what the trials of a search must hold to.

    model.depth == 10 and optim.lr > 3e-3
    data in ('dclm', 'c4') or not optim.clip == null
    seed != 0 and train.batch_size >= 64
    verdict == 'stable' and final_loss < 3.2        (of a search alone: statistics of a trial)

Settings under their dotted names, groups as the name of their preset, `seed`; comparisons (chained too), `in`, `and`,
`or`, `not`, brackets, numbers, text, null, true, false. The text is parsed by Python's own parser and walked here:
nothing is evaluated that is not on this list. An order comparison with null is false.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
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
    setting: str = "sweep.exclude"  # where it was written

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether the condition is true of a trial; `values`: by every name that it reads.

        Raises ConfigError where it compares values of different kinds.
        """
        try:
            return bool(_value(self.tree, values))
        except TypeError as error:
            raise ConfigError(Problem(self.setting, "compares values of different kinds", str(error))) from error


def known_names() -> list[str]:
    """What a condition may name: every setting, every group, seed."""
    return [*setting_names(), *GROUPS]


def parse(
    text: str, setting: str = "sweep.exclude", columns: Sequence[str] = (), words: Collection[str] = ()
) -> Expression:
    """The text as an Expression. Raises ConfigError that names what is not in the language.

    `setting`: where it was written. `columns`: what it may name beside `known_names`. `words`: names that stand for
    themselves, as text.
    """
    if len(text) > MAX_LENGTH:
        raise ConfigError(Problem(setting, f"a condition has at most {MAX_LENGTH} characters", str(len(text))))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `1 is 1` and `3in x` warn; both are refused or harmless below
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(Problem(setting, "is not a condition", repr(text))) from error
    tree = _Words(words).visit(tree)
    rules: list[str] = []
    names: set[str] = set()
    _check(tree, names, [*known_names(), *columns], rules)
    if not rules and not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
        rules.append("a condition compares something")
    if rules:
        raise ConfigError([Problem(setting, rule, repr(text)) for rule in rules])
    return Expression(text, frozenset(names), tree, setting)


class _Words(ast.NodeTransformer):
    """Replaces names that stand for themselves by their text."""

    def __init__(self, words: Collection[str]):
        self.words = words

    def visit_Name(self, node: ast.Name) -> ast.expr:  # noqa: N802, D102
        return ast.Constant(node.id) if node.id in self.words else node


def _check(node: ast.expr, names: set[str], known: list[str], rules: list[str]) -> None:
    """Note every name, and the rule that is broken by everything that is not in the language."""
    dotted = _dotted(node)
    if dotted is not None:
        if dotted in _CONSTANTS:
            return
        names.add(dotted)
        if dotted not in known:
            rules.append(f"{dotted} is not a setting{_near(dotted, known)}")
        return
    for child in _parts(node):
        if child is None:
            rules.append(f"{_spelling(node)} is not allowed in a condition")
        else:
            _check(child, names, known, rules)


def _near(dotted: str, known: list[str]) -> str:
    if dotted in CURRENT_NAMES:
        return f" (did you mean {CURRENT_NAMES[dotted]}?)"
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
        raise TypeError(f"{left!r} and {right!r}") from error
