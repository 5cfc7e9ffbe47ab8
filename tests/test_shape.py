"""Which trials share a shape: every setting is placed, and the parts of settings that count."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest

from stabstudy import config as cfg
from stabstudy import shape
from stabstudy.config import TrialConfig

BASE: dict[str, dict[str, Any]] = {"model": {"dim": 64, "n_heads": 4}, "train": {"steps": 100}}


def trial(**settings: Any) -> TrialConfig:
    """A trial with dotted settings, written with two underscores for the dot."""
    nested: dict[str, Any] = {group: dict(values) for group, values in BASE.items()}
    for name, value in settings.items():
        group, _, key = name.partition("__")
        if key:
            nested.setdefault(group, {})[key] = value
        else:
            nested[group] = value
    return cfg.stored(nested)


def another(value: Any, field: dataclasses.Field[Any]) -> Any:
    """A value other than this one, of the field's type."""
    if "choices" in field.metadata:
        return next(choice for choice in field.metadata["choices"] if choice != value)
    kind = str(field.type).split(" |")[0]
    if kind == "bool":
        return not value
    return "other" if kind == "str" else (value or 0) + (1 if kind == "int" else 0.5)


def test_every_setting_is_placed_once() -> None:
    placed = [*shape.OWN, *shape.IN_PART, *shape.EQUAL]
    assert sorted(placed) == sorted(cfg.setting_names())


@pytest.mark.parametrize("name", cfg.setting_names())
def test_a_setting_splits_packs_where_it_must_be_equal_and_nowhere_else(name: str) -> None:
    """One setting is changed at a time, on the dataclasses themselves: no table of ours says how."""
    one = TrialConfig()
    group, _, key = name.rpartition(".")
    owner = operator.attrgetter(group)(one) if group else one
    (field,) = [f for f in dataclasses.fields(owner) if f.name == key or f.name == name]
    changed: Any = dataclasses.replace(owner, **{field.name: another(getattr(owner, field.name), field)})
    while group:  # from the innermost group outwards
        outer, _, inner = group.rpartition(".")
        changed = dataclasses.replace(operator.attrgetter(outer)(one) if outer else one, **{inner: changed})
        group = outer
    two = changed
    assert two != one
    expected = [name] if name in shape.EQUAL or name in ("optim.clip_kind", "train.z_loss") else []
    if name == "train.batch_size":
        expected = ["train.batch_size", "train.micro_batch_size"]  # null follows it
    if name == "model.n_heads":
        expected = ["model.n_heads", "model.n_kv_heads"]
    assert shape.differing(one, two) == shape.differing(two, one) == expected


def test_resolved_values_count() -> None:
    assert not shape.differing(trial(), trial(train__micro_batch_size=8, model__n_kv_heads=4))
    assert shape.differing(trial(), trial(train__micro_batch_size=4)) == ["train.micro_batch_size"]


def test_a_clip_that_is_off_is_a_threshold_of_the_norm() -> None:
    assert not shape.differing(trial(optim__clip=None), trial(optim__clip=0.5))
    assert not shape.differing(trial(optim__clip=None, optim__clip_kind="agc"), trial())
    assert shape.differing(trial(optim__clip=None), trial(optim__clip_kind="zclip")) == ["optim.clip_kind"]


def test_a_z_loss_counts_only_as_there_or_not() -> None:
    assert not shape.differing(trial(train__z_loss=1e-4), trial(train__z_loss=1e-3))
    assert shape.differing(trial(train__z_loss=1e-4), trial()) == ["train.z_loss"]


def test_steps_count_only_where_they_decide_about_compiling() -> None:
    few, many = 100, cfg.COMPILE_FROM
    assert not shape.differing(trial(train__steps=few), trial(train__steps=many))
    auto = [trial(train__steps=n, train__compile="auto") for n in (few, many, many + 1)]
    assert shape.differing(auto[0], auto[1]) == ["train.steps"] and not shape.differing(auto[1], auto[2])
    # without a compiler auto trains uncompiled, and on is an error: never one pack
    assert shape.differing(auto[1], trial(train__steps=many, train__compile="on")) == ["train.compile"]
