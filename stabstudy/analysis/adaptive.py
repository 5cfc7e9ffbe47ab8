"""Studies whose values were chosen by results: what of a grid's report they cannot support.

Values near an edge or near a best cell are over-represented, and which are there depends on what was seen: statements
over several of them (effects, contrasts, importance, LR sensitivity, maps) would be biased, and are left out.
"""

from __future__ import annotations

from contextlib import suppress

from stabstudy.analysis import searches
from stabstudy.analysis.study import Study
from stabstudy.store import StoreError


def why_biased(study: Study) -> str | None:
    """Why such a statement is left out of the study's report; None for a grid, and for several studies."""
    if study.searched is not None:
        return study.searched.bias
    if "study" in study.trials.columns:
        return None
    with suppress(StoreError):
        if (search := searches.recorded(study.folder)) is not None:
            return f"the cells were chosen by what earlier ones did ({search.sampler}), most of them near the best"
    return None
