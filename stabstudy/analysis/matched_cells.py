"""The cells that several studies hold: a mean over other ones would differ for its cells, not for its study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pandas as pd

from stabstudy.analysis.levels import Level, keys
from stabstudy.analysis.study_statistics import STUDY


def matched(trials: pd.DataFrame, axes: Mapping[str, Sequence[Level]]) -> tuple[set[str], list[str]]:
    """The done trials of the cells that several studies hold, and these studies; none where no two share a cell.

    They are as many studies as share any cell at all, the first study among them where it does: a mean over cells that
    one of them lacks would differ from its mean for the cells alone.
    """
    done = trials[trials["state"] == "done"]
    cells = keys(done, [a for a in axes if a != STUDY])
    holders: dict[tuple[Level, ...], set[str]] = {}
    for cell, study in zip(cells, done[STUDY], strict=True):
        holders.setdefault(cell, set()).add(study)
    groups = Counter(frozenset(names) for names in holders.values() if len(names) > 1)
    if not groups:
        return set(), []
    first = axes[STUDY][0]
    drawn = max(groups, key=lambda names: (len(names), first in names, groups[names], sorted(map(str, names))))
    held = {cell for cell, names in holders.items() if drawn <= names}
    ids = [(str(t), s) for t, s, cell in zip(done.index, done[STUDY], cells, strict=True) if cell in held]
    return {t for t, s in ids if s in drawn}, [str(name) for name in axes[STUDY] if name in drawn]
