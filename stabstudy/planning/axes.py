"""Axes of a sweep, and the product of their values.

The command line wins everywhere: an override with several values replaces the axis of that setting, or adds one; a
single value pins the setting, which takes it out of the grid, out of every zip, and overrules the cases. An axis on the
command line leaves the cases as they are: they are cells of their own, not part of the product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader

from stabstudy.config import CURRENT_NAMES, GROUPS, SETTINGS, setting_names
from stabstudy.planning import compose
from stabstudy.settings import Issues, nearest
from stabstudy.space import HOLDS, MOST_RESOLUTIONS, default_resolution, resolutions

MAX_VALUES = 10_000
"""Of one axis; a longer one is a typing error, and must not be enumerated to find out."""

MAX_SEED = SETTINGS["seed"].metadata["le"]


EXCLUSIVE = {"optim.warmup_steps": "optim.warmup_share", "optim.warmup_share": "optim.warmup_steps"}
"""Two settings of one quantity: choosing one makes the other null, also where the sweep file had set it."""


@dataclass(frozen=True)
class Chosen:
    """A value, and where it was written ("from override 'optim.lr=1'", "sweeps/x.yaml:7")."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Between:
    """A setting of which the largest value that holds is searched; written as {between: [low, high], ...}.

    The scale is logarithmic where `low` is above 0: `resolution` is a factor there, and a difference on a linear one.
    """

    setting: str
    low: float
    high: float
    resolution: float
    holds: str = HOLDS[0]
    origin: str = field(default="", compare=False)

    @property
    def log(self) -> bool:
        return self.low > 0

    @property
    def ends(self) -> tuple[Any, Any]:
        """Both ends in the setting's type."""
        kinds = int if kind(self.setting) == "int" else float
        return kinds(self.low), kinds(self.high)

    @property
    def record(self) -> dict[str, Any]:
        """As it is written."""
        return {"between": list(self.ends), "resolution": self.resolution, "holds": self.holds}


Choices = dict[str, Chosen]
"""What a combination chooses: values of settings, presets of groups."""

Factor = list[Choices]
"""One factor of the product, its alternatives: an axis has one name in each, zipped axes have several."""


def check_name(name: str, origin: str, issues: Issues) -> bool:
    """Whether an axis may have this name: a setting, or a group whose presets are its values."""
    if name == "seed":
        issues.refuse("sweep.grid.seed", "seeds are replicates, not an axis: write seeds: [0, 1, 2]", origin=origin)
    elif name == "compute" or name.startswith("compute."):
        issues.refuse(name, "sets where trials run, not what they train: it cannot vary within a study", origin=origin)
    elif name not in GROUPS and name not in setting_names():
        issues.refuse(name, f"is not a setting{suggestion(name)}", origin=origin)
    else:
        return True
    return False


def suggestion(name: str, others: Sequence[str] = ()) -> str:
    """' (did you mean optim.lr?)' for a misspelt setting: the same key in another group, else the nearest names."""
    if name in CURRENT_NAMES:
        return f" (did you mean {CURRENT_NAMES[name]}?)"
    key = name.rpartition(".")[2]
    same_key = [known for known in setting_names() if known.rpartition(".")[2] == key]
    if same_key:
        return f" (did you mean {', '.join(same_key)}?)"
    return nearest(name, [*setting_names(), *GROUPS, *others]) or " (every setting: conf/ and stabstudy/config.py)"


def values(name: str, written: Any, origin: str, loader: ConfigLoader | None, issues: Issues) -> list[Chosen]:
    """The values of the axis `name` as written: a list, or {log: [a, b], num: n}. Equal ones are warned about, once."""
    if isinstance(written, dict):
        written = _spaced(name, written, origin, issues)
        if written is None:
            return []
    if not isinstance(written, list | tuple):
        hint = f"[{written}]" if not isinstance(written, str | dict) else "[...]"
        issues.refuse(name, f"an axis is a list of values, such as {hint}", repr(written), origin)
        return []
    if not written:
        issues.refuse(name, "the axis is empty", origin=origin)
    if len(written) > MAX_VALUES:
        issues.refuse(name, f"an axis has at most {MAX_VALUES} values", str(len(written)), origin)
        return []
    distinct: dict[str, Any] = {}
    for value in written:
        typed = as_setting(name, value)
        if repr(typed) in distinct:
            issues.warn(f"{name}: {typed!r} is listed twice in its axis and counts once ({origin})")
        distinct[repr(typed)] = typed
    chosen = [Chosen(value, origin) for value in distinct.values()]
    return chosen if loader is None else [c for c in chosen if is_possible(name, c, loader, issues)]


def between(name: str, written: Mapping[Any, Any], origin: str, issues: Issues) -> Between | None:
    """{between: [low, high], resolution: r, holds: stable | works} as a search over the setting."""
    if kind(name) not in ("int", "float") or name == "seed":
        issues.refuse(name, "a range is searched of settings that are numbers", repr(dict(written)), origin)
        return None
    ends = written.get("between")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(e) in (int, float) for e in ends)
    if set(written) - {"between", "resolution", "holds"} or not numbers:
        rule = "a search is {between: [low, high]}, with resolution: a number and holds: stable or works if need be"
        issues.refuse(name, rule, repr(dict(written)), origin)
        return None
    low, high = ends  # type: ignore[misc]
    whole = kind(name) != "int" or all(float(e).is_integer() for e in (low, high))
    if not (-math.inf < low < high < math.inf and whole):
        rule = f"a search needs low < high, both {'whole ' if kind(name) == 'int' else ''}numbers"
        issues.refuse(name, rule, repr(ends), origin)
        return None
    resolution = written.get("resolution", default_resolution(low, high))
    least = 1.0 if low > 0 else 0.0
    if type(resolution) not in (int, float) or not least < resolution < math.inf:
        rule = "must be a factor above 1 (the range lies above 0)" if low > 0 else "must be a difference above 0"
        issues.refuse(name, f"resolution {rule}", repr(resolution), origin)
        return None
    if not 1 <= round(resolutions(low, high, resolution, low > 0), 9) <= MOST_RESOLUTIONS:
        rule = f"resolution must fit 1 to {MOST_RESOLUTIONS} times into the range {low:g} to {high:g}"
        issues.refuse(name, rule, repr(resolution), origin)
        return None
    if (holds := written.get("holds", HOLDS[0])) not in HOLDS:
        issues.refuse(name, f"holds must be one of {', '.join(HOLDS)}", repr(holds), origin)
        return None
    return Between(name, float(low), float(high), float(resolution), holds, origin)


def is_possible(name: str, chosen: Chosen, loader: ConfigLoader, issues: Issues) -> bool:
    """Whether the value may be composed: any value of a setting (its rules come later), a known preset of a group."""
    problem = compose.check_preset(loader, name, chosen.value)
    if problem:
        issues.take([problem], chosen.origin)
    return problem is None


def seeds(written: Any, origin: str, issues: Issues) -> tuple[int, ...]:
    """`5` as seeds 0..4, or the seeds listed. Refuses an empty or mistyped list; equal seeds count once."""
    if type(written) is int and 1 <= written <= MAX_VALUES:
        return tuple(range(written))
    if not isinstance(written, list) or not written or any(type(s) is not int or s < 0 for s in written):
        rule = f"must be a number of seeds from 1 to {MAX_VALUES}, or a list of seeds such as [0, 7]"
        issues.refuse("seeds", rule, repr(written), origin)
        return (0,)
    if (largest := max(written)) > MAX_SEED:
        issues.refuse("seeds", f"each must be a whole number in [0, {MAX_SEED:,}]", repr(largest), origin)
        return (0,)
    return tuple(chosen.value for chosen in values("seed", written, origin, None, issues))


def as_setting(name: str, value: Any) -> Any:
    """The value in the setting's type where the two are the same number (1 and 1.0); anything else as it is."""
    if kind(name) == "float" and type(value) is int and abs(value) < 2**53:
        return float(value)
    return value


def rank(value: Any) -> tuple[int, float, str]:
    """Sorts numbers by size before text, and null last."""
    number = isinstance(value, int | float)
    return (0 if number else 2 if value is None else 1, float(value) if number else 0.0, str(value))


def kind(name: str) -> str:
    """The declared type of a setting: int, float, bool or str; 'preset' for a group."""
    return str(SETTINGS[name].type).split(" |")[0] if name in SETTINGS else "preset"


def _spaced(name: str, written: dict[Any, Any], origin: str, issues: Issues) -> list[float] | None:
    """{log: [a, b], num: n}: n values from a to b, each the same factor above the one before, 6 significant digits."""
    ends, count = written.get("log"), written.get("num")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(e) in (int, float) for e in ends)
    if set(written) != {"log", "num"} or not numbers or type(count) is not int or not 2 <= count <= MAX_VALUES:
        rule = f"an axis is a list, or {{log: [low, high], num: n}} with n from 2 to {MAX_VALUES}"
        issues.refuse(name, rule, repr(written), origin)
        return None
    low, high = float(ends[0]), float(ends[1])  # type: ignore[index]
    if not 0 < low < high < float("inf"):
        issues.refuse(name, "a logarithmic axis needs 0 < low < high", repr(ends), origin)
        return None
    between = [low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1)]
    if kind(name) == "int":
        return [round(v) for v in (low, *between, high)]
    return [low, *(float(f"{v:.6g}") for v in between), high]


def factors(own: Sequence[Factor], axes: Mapping[str, list[Chosen]], pins: Choices) -> list[Factor]:
    """The sweep's own factors, less what is pinned, with the command line's axes in their places."""
    replaced: list[Factor] = []
    used: set[str] = set()
    gone = {*axes, *pins} | {other for name, other in EXCLUSIVE.items() if name in axes or _is_set(name, pins)}
    for factor in own:
        names = list(factor[0])
        for name in names:
            if name in axes and name not in used:
                replaced.append([{name: chosen} for chosen in axes[name]])
                used.add(name)
        kept = [n for n in names if n not in gone]
        if kept:
            replaced.append(_distinct([{n: alternative[n] for n in kept} for alternative in factor]))
    replaced += [[{name: chosen} for chosen in axes[name]] for name in axes if name not in used]
    return [factor for factor in replaced if factor]


def axis_values(product: Sequence[Factor]) -> dict[str, tuple[Any, ...]]:
    """Every axis with its values, in order and each once."""
    by_name: dict[str, dict[str, Any]] = {}
    for factor in product:
        for alternative in factor:
            for name, chosen in alternative.items():
                by_name.setdefault(name, {})[repr(chosen.value)] = chosen.value
    return {name: tuple(values.values()) for name, values in by_name.items()}


def check_count(product: Sequence[Factor], cases: int, seeds: int, limit: int, issues: Issues) -> bool:
    """Whether the product may be enumerated; refused, with its shape, where it is too large."""
    sizes = [len(factor) for factor in product]
    total = (math.prod(sizes) + cases) * seeds if sizes or not cases else cases * seeds
    if total > limit:
        shape = " x ".join(str(n) for n in sizes) or "1"
        named = f"{total:,} trials = ({shape} cells + {cases} cases) x {seeds} seeds"
        issues.refuse("max_trials", f"at most {limit:,} trials are planned (max_trials=N raises it)", named)
    return total <= limit


def combinations(
    product: Sequence[Factor], cases: Mapping[str, Choices], pins: Choices
) -> Iterator[tuple[str | None, Choices]]:
    """The choices of every cell, in the order of the product, then of the cases with their names.

    A sweep of cases alone has no grid.
    """
    if product or not cases:
        for combination in itertools.product(*product):
            merged: Choices = {}
            for alternative in combination:
                merged |= alternative
            yield None, without_rivals(pins | merged)
    for name, chosen in cases.items():
        kept = {n: c for n, c in chosen.items() if not _is_set(EXCLUSIVE.get(n, ""), pins)}
        yield name, without_rivals(kept | pins)


def without_rivals(chosen: Choices) -> Choices:
    """The choices, and null for every setting that one of them excludes."""
    origins = {n: c.origin for n, c in chosen.items() if n in EXCLUSIVE and c.value is not None}
    return {EXCLUSIVE[n]: Chosen(None, origin) for n, origin in origins.items()} | chosen


def _is_set(name: str, pins: Choices) -> bool:
    return name in pins and pins[name].value is not None


def _distinct(factor: Factor) -> Factor:
    """Alternatives that a removed partner axis left equal stand once."""
    kept = {repr([(n, c.value) for n, c in alternative.items()]): alternative for alternative in factor}
    return list(kept.values())
