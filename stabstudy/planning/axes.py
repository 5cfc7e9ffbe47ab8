"""Axes: a setting or group and its values, from a sweep file or the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader

from stabstudy.config import CURRENT_NAMES, GROUPS, SETTINGS, setting_names
from stabstudy.planning import compose
from stabstudy.planning.findings import Findings
from stabstudy.settings import nearest

MAX_VALUES = 10_000
"""Of one axis; a longer one is a typing error, and must not be enumerated to find out."""

MAX_SEED = SETTINGS["seed"].metadata["le"]


@dataclass(frozen=True)
class Chosen:
    """A value, and where it was written ("from override 'optim.lr=1'", "sweeps/x.yaml:7")."""

    value: Any
    origin: str


Alternatives = list[dict[str, Chosen]]
"""One factor of the product: an axis has one name in each alternative, zipped axes have several."""


def check_name(name: str, origin: str, found: Findings) -> bool:
    """Whether an axis may have this name: a setting, or a group whose presets are its values."""
    if name == "seed":
        found.refuse("sweep.grid.seed", "seeds are replicates, not an axis: write seeds: [0, 1, 2]", origin=origin)
    elif name == "compute" or name.startswith("compute."):
        found.refuse(name, "sets where trials run, not what they train: it cannot vary within a study", origin=origin)
    elif name not in GROUPS and name not in setting_names():
        found.refuse(name, f"is not a setting{suggestion(name)}", origin=origin)
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


def values(name: str, written: Any, origin: str, loader: ConfigLoader | None, found: Findings) -> list[Chosen]:
    """The values of the axis `name` as written: a list, or {log: [a, b], num: n}. Equal ones are warned about, once."""
    if isinstance(written, dict):
        written = _spaced(name, written, origin, found)
        if written is None:
            return []
    if not isinstance(written, list | tuple):
        hint = f"[{written}]" if not isinstance(written, str | dict) else "[...]"
        found.refuse(name, f"an axis is a list of values, such as {hint}", repr(written), origin)
        return []
    if not written:
        found.refuse(name, "the axis is empty", origin=origin)
    if len(written) > MAX_VALUES:
        found.refuse(name, f"an axis has at most {MAX_VALUES} values", str(len(written)), origin)
        return []
    distinct: dict[str, Any] = {}
    for value in written:
        typed = as_setting(name, value)
        if repr(typed) in distinct:
            found.warn(f"{name}: {typed!r} is listed twice in its axis and counts once ({origin})")
        distinct[repr(typed)] = typed
    chosen = [Chosen(value, origin) for value in distinct.values()]
    return chosen if loader is None else [c for c in chosen if is_possible(name, c, loader, found)]


def is_possible(name: str, chosen: Chosen, loader: ConfigLoader, found: Findings) -> bool:
    """Whether the value may be composed: any value of a setting (its rules come later), a known preset of a group."""
    problem = compose.check_preset(loader, name, chosen.value)
    if problem:
        found.take([problem], chosen.origin)
    return problem is None


def seeds(written: Any, origin: str, found: Findings) -> tuple[int, ...]:
    """`5` as seeds 0..4, or the seeds listed. Refuses an empty or mistyped list; equal seeds count once."""
    if type(written) is int and 1 <= written <= MAX_VALUES:
        return tuple(range(written))
    if not isinstance(written, list) or not written or any(type(s) is not int or s < 0 for s in written):
        rule = f"must be a number of seeds from 1 to {MAX_VALUES}, or a list of seeds such as [0, 7]"
        found.refuse("seeds", rule, repr(written), origin)
        return (0,)
    if (largest := max(written)) > MAX_SEED:
        found.refuse("seeds", f"each must be a whole number in [0, {MAX_SEED:,}]", repr(largest), origin)
        return (0,)
    return tuple(chosen.value for chosen in values("seed", written, origin, None, found))


def as_setting(name: str, value: Any) -> Any:
    """The value in the setting's type where the two are the same number (1 and 1.0); anything else as it is."""
    if kind(name) == "float" and type(value) is int and abs(value) < 2**53:
        return float(value)
    return value


def kind(name: str) -> str:
    """The declared type of a setting: int, float, bool or str; 'preset' for a group."""
    return str(SETTINGS[name].type).split(" |")[0] if name in SETTINGS else "preset"


def _spaced(name: str, written: dict[Any, Any], origin: str, found: Findings) -> list[float] | None:
    """{log: [a, b], num: n}: n values from a to b, each the same factor above the one before, 6 significant digits."""
    ends, count = written.get("log"), written.get("num")
    numbers = isinstance(ends, list) and len(ends) == 2 and all(type(e) in (int, float) for e in ends)
    if set(written) != {"log", "num"} or not numbers or type(count) is not int or not 2 <= count <= MAX_VALUES:
        rule = f"an axis is a list, or {{log: [low, high], num: n}} with n from 2 to {MAX_VALUES}"
        found.refuse(name, rule, repr(written), origin)
        return None
    low, high = float(ends[0]), float(ends[1])  # type: ignore[index]
    if not 0 < low < high < float("inf"):
        found.refuse(name, "a logarithmic axis needs 0 < low < high", repr(ends), origin)
        return None
    between = [low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1)]
    if kind(name) == "int":
        return [round(v) for v in (low, *between, high)]
    return [low, *(float(f"{v:.6g}") for v in between), high]
