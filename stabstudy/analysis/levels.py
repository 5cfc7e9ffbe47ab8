"""The levels of an axis: in order, with null as a level of its own, and which rows lie at one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from stabstudy import config as cfg

Level = Any
"""A value of an axis: a number, text, a bool, or None (clipping off, no limit)."""

_GROUP_OF = {name: name.partition(".")[0] for name in cfg.setting_names()}

_DERIVED = {"train.micro_batch_size": "train.batch_size", "model.n_kv_heads": "model.n_heads"}
"""Settings whose null means another setting: where they are equal in every trial, they are no axis of their own."""


def plain(value: Any) -> Level:
    """A table's field as a level: numpy's scalars as Python's, NaN and NA as None."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if hasattr(value, "item") else value


def levels_of(column: Iterable[Any]) -> list[Level]:
    """The distinct levels, sorted: numbers by size, text by letters, null last."""
    distinct = {plain(v) for v in column}
    values = [v for v in distinct if v is not None]
    numeric = all(isinstance(v, (int, float)) for v in values)
    ordered = sorted(values) if numeric else sorted(values, key=str)
    return ordered + ([None] if None in distinct else [])


def ordered(levels: Iterable[Level]) -> bool:
    """Whether the levels have an order: numbers, and null (which comes last)."""
    return all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in levels)


def at_level(trials: pd.DataFrame, setting: str, level: Level) -> pd.DataFrame:
    """The rows whose `setting` is at `level`."""
    column = trials[setting]
    return trials[column.isna() if level is None else column == level]


def axes_of(trials: pd.DataFrame, groups: list[str]) -> dict[str, list[Level]]:
    """What differs between the trials, seed excluded, in the order of the settings: name -> levels.

    A group choice (`data`) that differs stands for the settings that merely follow it.
    """
    axes: dict[str, list[Level]] = {}
    ingested = "log_format" in trials and bool(trials["log_format"].notna().any())
    for name in (*_in_order(groups), *(c for c in trials.columns if str(c).startswith("external."))):
        levels = levels_of(trials[name]) if name in trials else []
        if ingested and None in levels:  # not known of every run, so nothing can be laid out along it
            continue
        if len(levels) > 1 and not _follows(trials, name, axes):
            axes[name] = levels
    return axes


def _in_order(groups: list[str]) -> list[str]:
    """Group choices before the settings of their group."""
    ordered: list[str] = []
    for name in cfg.setting_names():
        group = _GROUP_OF[name]
        if group in groups and group not in ordered:
            ordered.append(group)
        if name != "seed":
            ordered.append(name)
    return ordered


_WARMUPS = ("optim.warmup_steps", "optim.warmup_share")
"""Two ways to say one thing: the share is the axis where every trial has one, else the steps that it comes to."""


def _follows(trials: pd.DataFrame, name: str, axes: dict[str, list[Level]]) -> bool:
    """Whether another axis already says all that `name` says."""
    if name == cfg.PLACE:
        return True  # objective.init_id does: one and the same weights may lie in two places
    if name in _DERIVED:
        return bool((trials[name] == trials[_DERIVED[name]]).all())
    if name in _WARMUPS and set(_WARMUPS) <= set(trials):
        return bool(trials["optim.warmup_share"].notna().all()) == (name == "optim.warmup_steps")
    group = _GROUP_OF.get(name)
    if group is None or group not in axes or name == group:
        return False
    parts = trials.groupby(group, dropna=False)[name]
    return all(len(levels_of(part)) == 1 for _, part in parts)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table with plain values, null as None."""
    return [{str(k): plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def keys(trials: pd.DataFrame, settings: Sequence[str]) -> list[tuple[Level, ...]]:
    """Each row's levels of these settings; equal levels give equal keys, null included."""
    columns = [[plain(v) for v in trials[name]] for name in settings]
    return list(zip(*columns, strict=True)) if columns else [()] * len(trials)


def split(trials: pd.DataFrame, axes: Mapping[str, Sequence[Level]]) -> list[tuple[tuple[Level, ...], pd.DataFrame]]:
    """The rows by their levels of these axes, in the order of the levels; combinations without a row are left out."""
    members: dict[tuple[Level, ...], list[int]] = {}
    for i, levels in enumerate(keys(trials, list(axes))):
        members.setdefault(levels, []).append(i)
    ordered = itertools.product(*axes.values())
    return [(levels, trials.iloc[members[levels]]) for levels in ordered if levels in members]
