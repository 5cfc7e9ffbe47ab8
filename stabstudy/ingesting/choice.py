"""Choice of columns: which is the step, the loss, the gradient norm and the learning rate, by names and values.

The user's word (the options --columns and --set, read here too) goes before every name that is known.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stabstudy.external import check
from stabstudy.ingesting.aliases import AFTER_CLIP, NOT, place, plain
from stabstudy.ingesting.points import LogError, real, whole

Rows = Sequence[Mapping[str, Any]]

COLUMNS = ("step", "loss", "grad_norm", "lr")
NOUNS = {"step": "step", "loss": "loss", "grad_norm": "gradient norm", "lr": "learning rate"}
LOG_CALLS = "_step"
"""W&B's own counter. It never goes back and is always there, but counts calls of its log function."""

MOSTLY = 0.99
RARE = 0.02
"""A column with numbers in no more than this share of the rows of the best is a summary, and no rival."""

MOST_SHOWN = 12

_BEFORE = re.compile(r"(^|_)(before|pre|un|no|raw)_?(clip\w*)?(_|$)|(^|_)raw(_|$)")
_AFTER = re.compile(r"(^|_)(after|post)(_?clip\w*)?(_|$)|(^|_)clipped(_|$)")
_LIKE = {
    "step": re.compile(r".*(step|iter|update|batch).*|s"),
    "loss": re.compile(r".*(loss|nll|xent|cross_entropy|objective).*|ce|value"),
    "grad_norm": re.compile(r".*grad.*norm.*|.*norm.*grad.*|(.*_)?g_?norm(_.*)?|norm|.*_norm_total"),
    "lr": re.compile(r"(.*_)?(lr|learning_rate)(_.*)?"),
}
_PARTS = re.compile(r".*(param|weight|update|moment|actv|activation|layer|embed|head|ratio|max_grad).*")
"""Norms of something else, or of a part: never offered."""


@dataclass(frozen=True)
class Choice:
    """Columns by our names."""

    names: dict[str, str]
    notes: tuple[str, ...]  # what was chosen over what
    untaken: dict[str, str]  # ours, without a column -> what may be one, and how to take it

    @property
    def after_clipping(self) -> bool:
        """Whether the gradient norm is by its name that after clipping."""
        name = self.names.get("grad_norm")
        return name is not None and _side(name) > 0


def choose(rows: Rows, columns: Sequence[str], given: Mapping[str, str], runs: Sequence[Hashable]) -> Choice:
    """The columns of a log.

    Args:
        rows: All of its rows.
        columns: Every name in them.
        given: Ours -> the log's name, by the user: goes first.
        runs: Of each row, which run or rank it belongs to as far as its own columns say.

    Raises LogError, naming what there is, where no column is known as the step, or none as loss or gradient norm.
    """
    if absent := [theirs for theirs in given.values() if theirs not in columns]:
        raise LogError(f"has no column {', '.join(absent)} (it has: {listed(columns)})")
    best = {ours: _best(ours, rows, columns) for ours in COLUMNS[1:] if ours not in given}
    names = {ours: ranked[0] for ours, ranked in best.items() if ranked} | dict(given)
    measured = [names[ours] for ours in ("loss", "grad_norm") if ours in names]
    carrying = [i for i, row in enumerate(rows) if any(real(row.get(name)) is not None for name in measured)]
    notes = [_over(ours, ranked[0], ranked[1:]) for ours, ranked in best.items() if len(ranked) > 1]
    if "step" not in given and (steps := _steps(rows, carrying, columns, runs)):
        names["step"] = steps[0].name
        if rivals := [f"{s.name}{s.weakness}" for s in steps[1:] if s.values != steps[0].values]:
            notes.insert(0, _over("step", steps[0].name, rivals))
    if "step" not in names or not measured:
        raise LogError(unknown(columns, names))
    untaken = {ours: _not_taken(ours, columns) for ours in ("loss", "grad_norm") if ours not in names}
    return Choice({ours: names[ours] for ours in COLUMNS if ours in names}, tuple(notes), untaken)


def flag(names: Mapping[str, str]) -> str:
    """The option --columns that takes these columns, in the form that can hold their names, ready for a shell."""
    if any(set(name) & set(',="') or name.startswith("{") for name in names.values()):
        return f"--columns {shlex.quote(json.dumps(dict(names), ensure_ascii=False))}"
    return f"--columns {shlex.quote(','.join(f'{ours}={name}' for ours, name in names.items()))}"


def listed(columns: Sequence[str]) -> str:
    """Some names of columns in a sentence."""
    more = f" and {len(columns) - MOST_SHOWN} more" if len(columns) > MOST_SHOWN else ""
    return (", ".join(columns[:MOST_SHOWN]) + more) or "none"


def is_step(column: str) -> bool:
    """Whether a column is by its name alone a step."""
    return place("step", column) is not None


def looks_like_step(column: str) -> bool:
    """Whether it may be one, also under a name that is not known."""
    return is_step(column) or bool(re.fullmatch(r"(.*_)?(steps?|iter|iters|iterations?)(_.*)?", plain(column)))


def is_log(columns: Sequence[str]) -> bool:
    """Whether columns, also `RUN - METRIC` of a chart, are by their names alone those of a log."""
    return any(map(is_step, columns)) and any(is_known(column.rpartition(" - ")[2]) for column in columns)


def is_known(column: str) -> bool:
    """Whether a column is by its name alone the loss or the gradient norm."""
    return any(_rank(ours, column) is not None for ours in ("loss", "grad_norm"))


def _best(ours: str, rows: Rows, columns: Sequence[str]) -> list[str]:
    """The columns known as ours, the best first: of those with numbers in most of its rows the best name."""
    ranks = {name: rank for name in columns if (rank := _rank(ours, name)) is not None}
    numbers = {name: [real(row.get(name)) for row in rows] for name in ranks}
    counts = {name: sum(v is not None for v in values) for name, values in numbers.items()}
    most = max(counts.values(), default=0)
    ordered = sorted(ranks, key=lambda name: (2 * counts[name] < most, ranks[name]))
    first = numbers[ordered[0]] if ordered else []
    return [n for i, n in enumerate(ordered) if not i or (counts[n] > RARE * most and _differ(numbers[n], first))]


def _differ(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """Whether the first has a number that the second has not."""
    return any(x is not None and x != y and x == x for x, y in zip(a, b, strict=True))


def _rank(ours: str, name: str) -> tuple[int, int] | None:
    """Smaller is better; None: not known as ours. A norm before clipping goes before all others."""
    side = _side(name) if ours == "grad_norm" else 0
    known = place(ours, name)
    if known is None and side < 0:
        known = place(ours, _strip(name))
    return None if known is None else (side, known)


def _side(name: str) -> int:
    """-1: a norm that is by its name that before clipping; 1: after; 0: not said."""
    text = plain(name)
    if _AFTER.search(text) or name in AFTER_CLIP:
        return 1
    return -1 if _BEFORE.search(text) else 0


def _strip(name: str) -> str:
    """The name without the words before clipping."""
    return re.sub(r"_+", "_", _BEFORE.sub("_", plain(name))).strip("_")


def rising_steps(rows: Rows, columns: Sequence[str], taken: str) -> list[str]:
    """Other columns that never go back and may count steps, under whatever name."""
    others = [c for c in columns if c != taken and (looks_like_step(c) or c == LOG_CALLS)]
    series = {c: [v for row in rows if (v := whole(row.get(c))) is not None] for c in others}
    return [
        c for c, s in series.items() if len(set(s)) > len(rows) / 2 and all(a <= b for a, b in itertools.pairwise(s))
    ]


@dataclass(frozen=True)
class _Step:
    """A column that may be the step, on the rows that carry a loss or norm."""

    name: str
    values: tuple[int | None, ...]
    falls: int  # how often it goes back within a run
    constant: bool

    @property
    def share(self) -> float:
        return sum(v is not None for v in self.values) / max(1, len(self.values))

    @property
    def rank(self) -> tuple[bool, bool, bool, int, int]:
        calls = self.name == LOG_CALLS
        return (self.share < MOSTLY, self.constant, calls, self.falls, place("step", self.name) or 0)

    @property
    def weakness(self) -> str:
        if self.share < MOSTLY:
            return f" (whole in {self.share:.0%} of the rows)"
        if self.name == LOG_CALLS:
            return " (counts log calls)"
        return f" (goes back {self.falls} times)" if self.falls else " (constant)" if self.constant else ""


def _steps(rows: Rows, carrying: Sequence[int], columns: Sequence[str], runs: Sequence[Hashable]) -> list[_Step]:
    steps = [_step(name, rows, carrying, runs) for name in columns if is_step(name)]
    return sorted((s for s in steps if s.share or not carrying), key=lambda s: s.rank)


def _step(name: str, rows: Rows, carrying: Sequence[int], runs: Sequence[Hashable]) -> _Step:
    values = tuple(whole(rows[i].get(name)) for i in carrying)
    series: dict[Hashable, list[int]] = {}
    for i, value in zip(carrying, values, strict=True):
        if value is not None:
            series.setdefault(runs[i], []).append(value)
    falls = sum(b < a for steps in series.values() for a, b in itertools.pairwise(steps))
    constant = len(values) > len(series) and all(len(set(steps)) == 1 for steps in series.values())
    return _Step(name, values, falls, constant)


def _over(ours: str, chosen: str, rivals: Sequence[str]) -> str:
    shown = ", ".join(rivals[:3]) + (f" and {len(rivals) - 3} more" if len(rivals) > 3 else "")
    return f"{NOUNS[ours]}: {chosen}, chosen over {shown}"


def _candidates(ours: str, columns: Sequence[str]) -> list[str]:
    """Columns that look like ours without being known as that."""
    alike = [name for name in columns if _LIKE[ours].fullmatch(plain(name))]
    if ours == "grad_norm":
        return [name for name in alike if not _PARTS.fullmatch(plain(name))]
    return [name for name in alike if not any(re.fullmatch(e, plain(name)) for e in NOT[ours][:2])]


def _not_taken(ours: str, columns: Sequence[str]) -> str:
    """Columns that may be the missing one, and how to take them."""
    if not (alike := _candidates(ours, columns)):
        return f"no column is known as the {NOUNS[ours]} (columns: {listed(columns)}); --columns can name one"
    offers = ", ".join(f"{flag({ours: name})}{' (after clipping)' if _side(name) > 0 else ''}" for name in alike[:3])
    more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
    return f"no column is known for certain as the {NOUNS[ours]}; what may be one is taken with {offers}{more}"


def unknown(columns: Sequence[str], known: Mapping[str, str] | None = None) -> str:
    """Why columns are no log's; what may be the missing ones, and how to take it. `known`: what is not missing."""
    if known is None:
        known = {ours: name for ours in COLUMNS for name in columns if _rank(ours, name) is not None}
    missing = [ours for ours in COLUMNS[:3] if ours not in known]
    alike = {ours: names[0] for ours in missing if (names := _candidates(ours, columns))}
    enough = "step" in {*alike, *known} and {"loss", "grad_norm"} & {*alike, *known}
    lacks = [NOUNS["step"]] if "step" not in known else []
    lacks += [] if known.keys() & {"loss", "grad_norm"} else ["loss or gradient norm"]
    return (
        f"has no column known as the {', and none as the '.join(lacks)} (it has: {listed(columns)}); name them, as in "
        f"{flag(alike) if enough else '--columns step=iter,grad_norm=gnorm,loss=train_loss'}"
    )


def parse_columns(text: str | None) -> dict[str, str]:
    """`step=iter,loss=train_loss`, or the same as a JSON object, as a mapping. Raises ValueError."""
    if text is None:
        return {}
    pairs = _from_json(text) if text.lstrip().startswith("{") else [p.partition("=")[::2] for p in text.split(",")]
    for ours, theirs in pairs:
        if ours not in COLUMNS or not isinstance(theirs, str) or not theirs:
            raise ValueError(f"--columns: {ours}={theirs}: must be NAME=COLUMN with a NAME of {', '.join(COLUMNS)}")
    return dict(pairs)


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """`optim.clip=1.0` as a mapping of checked settings; `off` and `null` are None. Raises ValueError."""
    known: dict[str, Any] = {}
    for pair in given:
        name, _, text = pair.partition("=")
        known[name], problem = check(name, None if text in ("null", "off") else _number(text))
        if problem:
            raise ValueError(f"--set: {problem}")
    return known


def _from_json(text: str) -> list[tuple[str, Any]]:
    try:
        return list(json.loads(text).items())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--columns: {text[:200]}: must be a JSON object ({error})") from error


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
