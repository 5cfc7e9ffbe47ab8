"""The `search` block of a sweep file: its rules, checked all at once, each problem with the line it stands on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hydra.core.config_loader import ConfigLoader

from stabstudy import expressions, space
from stabstudy import settings as st
from stabstudy.config import GROUPS, SETTINGS
from stabstudy.planning import axes
from stabstudy.planning.document import Document
from stabstudy.settings import ConfigError, Issues, Problem, nearest
from stabstudy.space import CONSTRAINTS, SAMPLERS, Choice, Domain, Objective, Range, Search
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.verdict import VERDICTS

BLOCK = "sweep.search"
KEYS = ("sampler", "trials", "minimize", "maximize", "space", "constraints", "seed")
BESIDE = {
    "grid": "searches one space: write the axes of the grid under sweep.search.space as choices",
    "zip": "searches one space: it takes no zipped axes",
    "cases": "searches one space: train the cases in a sweep of their own",
    "exclude": f"has no grid to leave cells out of: write what must hold under {CONSTRAINTS}",
    "frontier": "and a frontier are two searches: ask for one of them",
}
"""Parts of a sweep that cannot stand beside a search, and why."""

NO_AXIS = {"objective.init_from": "names weights that are looked up, so its text does not name a trial"}
DERIVED = ("model.n_kv_heads", "train.micro_batch_size", "optim.warmup_steps")
"""Settings whose null is another number in each trial."""

MOST_TRIALS = 10_000
RANGES = ("log", "between", "int")
_RULE = "must be a list of choices, {log: [low, high]}, {between: [low, high]} or {int: [low, high]}"

NUMERIC = [name for name in SETTINGS if axes.kind(name) in ("int", "float") and name != "seed"]
NUMERIC += [name for name, column in COLUMNS.items() if column.kind in ("int", "float")]
"""Columns of trials.parquet that can be an objective."""


def read(block: Mapping[str, Any], doc: Document, loader: ConfigLoader, issues: Issues) -> Search | None:
    """The search of a sweep block; None where it asks for none, or with its problems noted."""
    if "search" not in block:
        return None
    for other in (key for key in BESIDE if block.get(key)):
        issues.refuse(f"sweep.{other}", f"cannot stand beside {BLOCK}, which {BESIDE[other]}", origin=_at(doc, other))
    written = block["search"]
    if not isinstance(written, dict):
        issues.refuse(BLOCK, "must be a mapping", repr(written), doc.where(BLOCK))
        return None
    return parse(written, doc.where, loader, issues)


def parse(
    written: Mapping[str, Any], where: Callable[[str], str], loader: ConfigLoader | None, issues: Issues
) -> Search | None:
    """The search as written, or None with every problem noted; `where`: a dotted key -> where it was written.

    `loader` None: presets of groups are taken as they are.
    """
    before = len(issues.problems)
    for key in [key for key in written if key not in KEYS]:
        part = f"{BLOCK}.{key}"
        issues.refuse(part, f"is not part of a search{nearest(str(key), list(KEYS))}", origin=where(part))
    sampler = _sampler(written.get("sampler", "TPE"), where, issues)
    trials = _whole("trials", written.get("trials"), 1, MOST_TRIALS, where, issues)
    seed = _whole("seed", written.get("seed", 0), 0, axes.MAX_SEED, where, issues)
    objectives = _objectives(written, where, issues)
    domains = _space(written.get("space"), where, loader, issues)
    constraints = _constraints(written.get("constraints") or [], where, issues)
    search = Search(sampler, trials, objectives, domains, constraints, seed)
    _check_fits(search, where, issues)
    return search if len(issues.problems) == before else None


def fixed(search: Search, names: Mapping[str, Any], issues: Issues) -> Search | None:
    """The search less the axes that the command line pins (`names`, with what it excludes); None where none is left."""
    gone = {*names} | {axes.EXCLUSIVE[n] for n in names if n in axes.EXCLUSIVE}
    left = {name: domain for name, domain in search.space.items() if name not in gone}
    if not left:
        issues.refuse(f"{BLOCK}.space", "has no axis left: the command line sets every one of them")
        return None
    return Search(search.sampler, search.trials, search.objectives, left, search.constraints, search.seed)


def _at(doc: Document, part: str) -> str:
    return doc.where(f"sweep.{part}")


def _sampler(written: Any, where: Callable[[str], str], issues: Issues) -> str:
    sampler = space.sampler_named(written) if isinstance(written, str) else None
    if sampler is None:
        near = nearest(str(written), list(SAMPLERS))
        issues.refuse(f"{BLOCK}.sampler", f"is no sampler{near}", repr(written), where(f"{BLOCK}.sampler"))
        return "TPE"
    return sampler.name


def _whole(key: str, value: Any, low: int, high: int, where: Callable[[str], str], issues: Issues) -> int:
    if type(value) is int and low <= value <= high:
        return value
    name, got = f"{BLOCK}.{key}", "nothing" if value is None else repr(value)
    issues.refuse(
        name, f"must be a whole number in [{low}, {high:,}]", got, where(name if value is not None else BLOCK)
    )
    return low


def _objectives(written: Mapping[str, Any], where: Callable[[str], str], issues: Issues) -> tuple[Objective, ...]:
    objectives: list[Objective] = []
    for way in ("minimize", "maximize"):
        name = f"{BLOCK}.{way}"
        listed = [written[way]] if isinstance(written.get(way), str) else written.get(way) or []
        if not isinstance(listed, list) or not all(isinstance(column, str) for column in listed):
            issues.refuse(name, "must be a list of columns of trials.parquet", repr(listed), where(name))
            continue
        for column in listed:
            if column not in NUMERIC:
                issues.refuse(name, f"{column} {_no_objective(column)}", origin=where(name))
            elif column in [objective.column for objective in objectives]:
                issues.refuse(name, f"{column} is listed twice", origin=where(name))
            else:
                objectives.append(Objective(column, way == "maximize"))
    if not objectives and not written.get("minimize") and not written.get("maximize"):
        issues.refuse(BLOCK, "needs an objective: minimize: [final_loss], or maximize", origin=where(BLOCK))
    return tuple(objectives)


def _no_objective(column: str) -> str:
    if column in COLUMNS or column in SETTINGS or column in GROUPS:
        return f"is no number, and cannot be an objective: use {CONSTRAINTS}"
    return f"is no column of trials.parquet{nearest(column, NUMERIC)}"


def _space(written: Any, where: Callable[[str], str], loader: ConfigLoader | None, issues: Issues) -> dict[str, Domain]:
    name = f"{BLOCK}.space"
    if not isinstance(written, dict) or not written:
        got = "nothing" if written is None else repr(written)
        issues.refuse(name, "must be a mapping from settings to what is searched", got, where(name))
        return {}
    domains: dict[str, Domain] = {}
    for axis, domain in written.items():
        origin = where(f"{name}.{axis}")
        if axis in NO_AXIS:
            issues.refuse(axis, f"cannot be searched: it {NO_AXIS[axis]}", origin=origin)
        elif axes.check_name(axis, origin, issues):
            read_domain = _range if isinstance(domain, dict) else _choice
            if (checked := read_domain(axis, domain, origin, loader, issues)) is not None:
                domains[axis] = checked
    rivals = [n for n in axes.EXCLUSIVE if n in domains]
    if len(rivals) > 1:
        issues.refuse(", ".join(rivals), "are two settings of one quantity: search one of them", origin=where(name))
    return domains


def _range(axis: str, written: Any, origin: str, _: ConfigLoader | None, issues: Issues) -> Range | None:
    kind = next(iter(written), None)
    ends = written.get(kind)
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(end) in (int, float) for end in ends)
    if len(written) != 1 or kind not in RANGES or not numbers:
        issues.refuse(axis, _RULE, repr(written), origin)
        return None
    if axis not in NUMERIC:
        issues.refuse(axis, "has no numbers to range over: list its choices", repr(written), origin)
        return None
    whole = kind == "int" or axis in space.WHOLE
    if whole and not all(type(end) is int for end in ends):
        issues.refuse(axis, "the ends must be whole numbers", repr(ends), origin)
        return None
    if not (0 < ends[0] < ends[1] if kind == "log" else ends[0] < ends[1]):
        rule = "a logarithmic range needs 0 < low < high" if kind == "log" else "a range needs low < high"
        issues.refuse(axis, rule, repr(ends), origin)
        return None
    low, high = (_checked(axis, end, origin, issues) for end in ends)
    return None if low is None or high is None else Range(low, high, kind == "log", whole)


def _choice(axis: str, written: Any, origin: str, loader: ConfigLoader | None, issues: Issues) -> Choice | None:
    if not isinstance(written, list) or not written or any(isinstance(v, list | dict) for v in written):
        issues.refuse(axis, _RULE, repr(written), origin)
        return None
    if axis in DERIVED and None in written:
        issues.refuse(axis, "null is another number in each trial: write the number", repr(written), origin)
        return None
    chosen = axes.values(axis, written, origin, loader if axis in GROUPS else None, issues)
    if axis in SETTINGS:
        before = len(issues.problems)
        values = tuple(_checked(axis, c.value, origin, issues) for c in chosen)
        return Choice(values) if len(issues.problems) == before else None
    return Choice(tuple(str(c.value) for c in chosen)) if chosen else None


def _checked(axis: str, value: Any, origin: str, issues: Issues) -> Any:
    """The value in the setting's type; None, with the problem noted, where it breaks a rule of its own."""
    problems: list[Problem] = []
    field = SETTINGS[axis]
    typed = st.read_value(axis, str(field.type), field.metadata, value, problems, None)
    issues.take(problems, origin)
    return typed


def _constraints(written: Any, where: Callable[[str], str], issues: Issues) -> tuple[expressions.Expression, ...]:
    if not isinstance(written, list) or not all(isinstance(text, str) for text in written):
        issues.refuse(CONSTRAINTS, "must be a list of conditions, each quoted", repr(written), where(CONSTRAINTS))
        return ()
    parsed = []
    for text in written:
        try:
            expression = expressions.parse(text, CONSTRAINTS, list(COLUMNS), VERDICTS)
            expression.holds({name: _EXAMPLES[_kind(name)] for name in expression.names})  # raises for mixed kinds
            parsed.append(expression)
        except ConfigError as error:
            issues.take(error.problems, where(CONSTRAINTS))
    return tuple(parsed)


_EXAMPLES: dict[str, Any] = {"int": 1, "float": 1.0, "bool": True, "str": "", "text": "", "preset": ""}


def _kind(name: str) -> str:
    return COLUMNS[name].kind if name in COLUMNS else axes.kind(name)


def _check_fits(search: Search, where: Callable[[str], str], issues: Issues) -> None:
    """Whether the sampler can do what is asked."""
    sampler, origin = SAMPLERS[search.sampler], where(f"{BLOCK}.sampler")
    if len(search.objectives) > 1 and not sampler.several:
        columns = ", ".join(objective.column for objective in search.objectives)
        issues.refuse(f"{BLOCK}.sampler", f"{sampler.name} takes one objective", columns, origin)
    losses = [o.column for o in search.objectives if COLUMNS.get(o.column) and COLUMNS[o.column].unit == "nat/token"]
    if losses and (data := [name for name in search.space if name.partition(".")[0] == "data"]):
        issues.warn(f"{', '.join(losses)} on different data cannot be compared: {', '.join(data)} decides by that too")
    if sampler.numeric and search.constraints:
        issues.warn(f"{CONSTRAINTS}: {sampler.name} learns of none: a cell that breaks one counts as the worst so far")
    ranges = [name for name, domain in search.space.items() if isinstance(domain, Range)]
    if sampler.numeric and search.space:
        if len(ranges) < 2:
            issues.refuse(f"{BLOCK}.sampler", f"{sampler.name} needs two ranges or more", str(len(ranges)), origin)
        elif choices := [name for name in search.space if name not in ranges]:
            issues.warn(f"{BLOCK}.sampler: {sampler.name} draws {', '.join(choices)} at random: it models ranges alone")
