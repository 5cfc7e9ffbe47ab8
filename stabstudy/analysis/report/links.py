"""Links to the pages of trials, wherever a table or a sentence names one.

A trial is recognised by its id, which nothing else looks like. So no block has to say where its links are, and a
mention cannot be forgotten. What is not a known id stays text, and is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Set

from markupsafe import Markup, escape

from stabstudy.analysis.study import Study

TRIALS = "trials/"
"""The folder of the trials' pages, beside the study's page."""

_ID = re.compile(r"(?<![0-9A-Za-z_])([0-9a-f]{10})(?![0-9A-Za-z_])")


def paged(study: Study) -> frozenset[str]:
    """The trials that get a page, the damaged ones too. A folder that is not named like a trial gets none."""
    ids = [*map(str, study.trials.index), *(d.trial_id for d in study.damaged)]
    return frozenset(t for t in ids if _ID.fullmatch(t))


def linked(text: str, trials: Set[str], folder: str) -> Markup:
    """The text, escaped, with a link to `<folder><trial_id>.html` at each of `trials` that it names."""
    parts = split_ids(text)
    if len(parts) == 1:
        return escape(text)
    return Markup("").join(_link(part, folder) if part in trials else escape(part) for part in parts)


def split_ids(text: str) -> list[str]:
    """The text in parts, of which every second one looks like the id of a trial."""
    return _ID.split(text)


def _link(trial_id: str, folder: str) -> Markup:
    return Markup('<a href="{}{}.html">{}</a>').format(folder, trial_id, trial_id)
