"""Commands that go on from a study: its last launch again, further, or with a search of the limit of the learning rate.

Each is None where none can ask it: the trials were trained elsewhere or belong to several studies, nobody recorded what
was typed, or it has what cannot be shown or typed, such as a secret. A page shows it as code between backticks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stabstudy import config as cfg
from stabstudy.analysis import adaptive
from stabstudy.analysis.frontiers import Asked
from stabstudy.analysis.levels import Level
from stabstudy.analysis.study import Study
from stabstudy.settings import named_fields
from stabstudy.space import HOLDS, MOST_RESOLUTIONS, WHOLE, default_resolution, resolutions
from stabstudy.wording import HIDDEN, command, word

LR = "optim.lr"

FURTHER = 10
"""How many times a search goes further than what was tried, where the setting's own bound allows it."""

SUFFIX = "_frontier"
"""Of the name of the study that a search for the limit goes into."""

QUICKSTART = "quickstart"  # the sweep of a launch that names none and asks nothing

_QUESTION = {name.partition(".")[0] for name in cfg.setting_names()} - {"seed"}
_UNSHOWN = (HIDDEN, "`", "objective.init_id=")
"""Of a command that cannot be typed: a secret, what would end its code, weights by identity in place of their path."""


def relaunch(
    study: Study, without: Collection[str] = (), levels: Sequence[str] = (), search: Sequence[str] = (), name: str = ""
) -> str | None:
    """The last launch without the words for these names, with these levels and this search, in the study `name`.

    `name`: by default the study's own.
    """
    typed = study.provenance.get("argv")
    if study.ingested or "study" in study.axes or not isinstance(typed, list):
        return None
    kept = [*_sweep(typed), *(text for text in map(str, typed) if _name(text) not in (*without, "study"))]
    own = name or study.name
    named = [] if f"sweep={own}" in kept else [f"study={own}"]
    text = command([*kept, *levels, *named, *search])
    return text if text.isprintable() and not any(mark in text for mark in _UNSHOWN) else None


def filled(study: Study, at: Mapping[str, Sequence[Level]]) -> str | None:
    """The last launch with these levels, or seeds, in place of those that it had."""
    seeds = [f"seeds=[{','.join(map(word, levels))}]" for name, levels in at.items() if name == "seed"]
    axes = {name: levels for name, levels in at.items() if name != "seed"}
    return relaunch(study, ("seeds", *at), [*_levels(axes), *seeds])


def searched(study: Study, low: float, holds: str, at: Mapping[str, Sequence[Level]]) -> str | None:
    """The last launch with the limit of the learning rate above `low` searched, at these levels of other axes.

    In a study of its own: values that were chosen by results would take the effects out of this study's report. None
    of a study that was itself a search, too.
    """
    high = min(FURTHER * low, bounds(LR)[1])
    if not 0 < low < high or adaptive.why_biased(study) is not None:
        return None
    ends = float(f"{low:.6g}"), float(f"{high:.6g}")
    search = _search(Asked(LR, *ends, default_resolution(*ends), holds))
    return relaunch(study, (LR, *at), _levels(at), [search], f"{study.name}{SUFFIX}")


def extended(study: Study, asked: Asked) -> str | None:
    """The last launch of a search with what it asked replaced by this: another range of the same setting.

    None, too, where the range holds too many resolutions to be searched.
    """
    if resolutions(asked.low, asked.high, asked.resolution, asked.low > 0) > MOST_RESOLUTIONS:
        return None
    return relaunch(study, (asked.setting,), search=[_search(asked)])


def above(asked: Asked) -> Asked | None:
    """What was asked with the range extended upwards; None where the setting allows nothing there."""
    high = FURTHER * asked.high if asked.scale.log else asked.high + (asked.high - asked.low)
    high = _within(asked, high, asked.high)
    return replace(asked, high=high) if high > asked.high else None


def below(asked: Asked) -> Asked | None:
    """What was asked with the range extended downwards; None where the setting allows nothing there."""
    low = asked.low / FURTHER if asked.scale.log else asked.low - (asked.high - asked.low)
    low = _within(asked, low, asked.low)
    return replace(asked, low=low) if low < asked.low else None


def _within(asked: Asked, end: float, before: float) -> float:
    """A new end of the range as far as the setting's rules allow, towards the end `before`; in 6 digits."""
    low, high = bounds(asked.setting)
    metadata = _metadata(asked.setting)
    if metadata.get("lt") is not None and end >= high:  # which the setting itself cannot have
        end = (before + high) / 2
    end = min(max(end, low), high)
    return float(math.ceil(end)) if asked.setting in WHOLE else float(f"{end:.6g}")


def bounds(setting: str) -> tuple[float, float]:
    """The smallest and the largest value that the rules of the setting allow; infinite where there is none."""
    metadata = _metadata(setting)
    low, high = (
        [metadata[name] for name in names if metadata.get(name) is not None] for names in (("ge", "gt"), ("le", "lt"))
    )
    return float(*low or ["-inf"]), float(*high or ["inf"])


@functools.cache
def _metadata(setting: str) -> Mapping[str, Any]:
    return dict(named_fields(cfg.TrialConfig))[setting].metadata


def _levels(at: Mapping[str, Sequence[Level]]) -> list[str]:
    return [f"{axis}={','.join(map(word, levels))}" for axis, levels in at.items()]


def _search(asked: Asked) -> str:
    """What is asked as an override, without what is the default."""
    ends = [int(end) if end.is_integer() else end for end in (asked.low, asked.high)]
    parts: dict[str, Any] = {"between": ends}
    if asked.resolution != default_resolution(asked.low, asked.high):
        parts["resolution"] = asked.resolution
    if asked.holds != HOLDS[0]:
        parts["holds"] = asked.holds
    return f"{asked.setting}={word(parts)}"


def _name(text: str) -> str:
    """Of what an override is."""
    return text.partition("=")[0].lstrip("+")


def _sweep(typed: Sequence[str]) -> Iterator[str]:
    """The name of the sweep where the launch left it to a rule, which other words would answer otherwise."""
    names = [_name(text) for text in typed]
    if "sweep" not in names and not any(name.partition(".")[0] in _QUESTION for name in names):
        yield f"sweep={QUICKSTART}"
