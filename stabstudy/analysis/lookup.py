"""Lookup of the names that people type, with the nearest for a miss.

Every error of a name in a study is a KeyError of one line: the name, what it should have been, and the known names,
all of them or the nearest of many.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stabstudy.analysis import compare, words
from stabstudy.analysis.levels import Level, plain
from stabstudy.settings import nearest
from stabstudy.stability.summary import COLUMNS
from stabstudy.store import StoreError, StudyFolder, open_study

MOST_NAMED = 24
"""Names that an error lists in full."""

MOST_MATCHES = 6
"""Trials that an ambiguous beginning of an id is answered with."""


RESULTS = "results"
"""Where launches put studies unless told otherwise."""


def study_folder(path: Path) -> StudyFolder:
    """The study in this folder; of a relative path also in results/, and without results/ at its start.

    So one line of Python finds a study from beside results/ and from inside it. Raises StoreError with every place.
    """
    inside = Path(*path.parts[1:]) if path.parts[:1] == (RESULTS,) else path
    named = not path.is_absolute() and inside.parts[:1] not in ((), ("..",))
    others = [place for place in (Path(RESULTS) / inside, inside) if place != path] if named else []
    try:
        return open_study(path)
    except StoreError as error:
        for place in others:
            with contextlib.suppress(StoreError):
                return open_study(place)
        either = f"; nor is {' or '.join(map(str, others))}, seen from {Path.cwd().name}/" if others else ""
        raise StoreError(f"{error}{either}") from error


@dataclass(frozen=True)
class Names:
    """The names of one study: its own, and its axes with their levels."""

    study: str
    axes: Mapping[str, Sequence[Level]]

    def axis(self, name: str) -> str:
        """The axis. Raises KeyError."""
        return self.one_of(name, [*self.axes], "axis")

    def axis_or_column(self, name: str, trials: pd.DataFrame) -> pd.Series[Any]:
        """The column of trials that an axis, or else a setting or statistic, is. Raises KeyError."""
        if name in trials:
            return trials[name]
        near = nearest(name, list(dict.fromkeys([*self.axes, *map(str, trials.columns)])))
        axes = ", ".join(self.axes) or "none"
        raise KeyError(f"{name!r} is no axis of study {self.study} (it has: {axes}) and no column of its trials{near}")

    def axes_beside(self, names: str | Sequence[str] | None, *others: str) -> list[str]:
        """This axis or these (None: all), which `others`, axes too, are none of. Raises KeyError."""
        names = [names] if isinstance(names, str) else names
        taken = [self.axis(other) for other in others]
        rest = [a for a in self.axes if a not in taken]
        what = f"axis beside the {words.listing([words.label(a) for a in others])}" if others else "axis"
        return rest if names is None else [self.one_of(name, rest, what) for name in names]

    def statistic(self, name: str) -> str:
        """The statistic, one that has a mean. Raises KeyError."""
        return self.one_of(name, [*compare.statistics(), "final_loss"], "statistic")

    def compared(self, name: str) -> str:
        """The statistic, one that levels are compared in. Raises KeyError, ValueError for a count."""
        if compare.counted(self.statistic(name)):
            rates = [n for n in COLUMNS if n.startswith("spike_") and n.endswith(("_rate", "_per_1k"))]
            raise ValueError(f"{name} is a count, and counts are compared as rates: {', '.join(rates)}")
        return name

    def one_of(self, name: str, known: Sequence[str], what: str) -> str:
        """The name. Raises KeyError where it is none of the known ones, `what` they are."""
        if name in known:
            return name
        whole = f" (it has: {', '.join(known) or 'none'})" if len(known) <= MOST_NAMED else nearest(name, [*known])
        raise KeyError(f"{name!r} is no {what} of study {self.study}{whole}")

    def level(self, axis: str, value: Level, levels: Sequence[Level]) -> Level:
        """The value, one of these levels of an axis. Raises KeyError with the levels."""
        if (level := plain(value)) in levels:
            return level
        texts = [words.level(v, axis) for v in levels]
        near = texts if len(texts) <= MOST_NAMED else difflib.get_close_matches(str(value), texts, 3, 0)
        more = "" if near is texts else f", and {len(texts) - len(near)} more"
        raise KeyError(f"{value!r} is no level of {axis} in study {self.study} (it has: {', '.join(near)}{more})")

    def trial(self, given: str, ids: Iterable[str]) -> str:
        """The trial whose id is, or alone begins with, what is given. Raises KeyError for none and for several.

        Of several studies as one, an id begins with its study's name, which may be left out.
        """
        ids = [*ids]
        if given in ids:
            return given
        own = [t for t in ids if given and (t.startswith(given) or t.partition("/")[2].startswith(given))]
        if len(own) == 1:
            return own[0]
        if not own:
            raise KeyError(f"no trial {given} in study {self.study}{nearest(given, ids)}")
        listed = [*own[:MOST_MATCHES], *(["..."] if len(own) > MOST_MATCHES else [])]
        raise KeyError(f"{given!r} begins {len(own)} trials of study {self.study}: {', '.join(listed)}")
