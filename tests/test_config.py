"""Settings: their rules, the way in from plain mappings, and the ids that name trials for ever."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy import config as cfg
from stabstudy.config import ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.data import sources
from stabstudy.settings import ConfigError


def problems_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        cfg.from_dict(values)
    return [str(p) for p in caught.value.problems]


# ids

LATER = {
    "data.files": None,
    "data.layout": "packed",
    "data.labels": False,
    "objective.kind": "lm",
    "model.family": "lingua",
    "model.logit_softcap": None,
    "model.attn_softcap": None,
    "model.embed_scale": 1.0,
    "model.norm_placement": "pre",
    "model.ffn": "swiglu",
    "model.residual_scale": "none",
    "optim.kind": "adamw",
    "optim.lr_rule": "none",
    "optim.base_batch": None,
    "optim.decay_shape": "linear",
    "optim.warmup_share": None,
    "optim.muon_lr": None,
    "optim.muon_momentum": 0.95,
    "optim.muon_adjust_lr": "match_rms_adamw",
    "optim.clip_kind": "norm",
    "train.skip_spikes": False,
    "train.final_eval_tokens": 16_384,
    "objective.beta": 0.1,
    "objective.desirable": 1.0,
    "objective.undesirable": 1.0,
}
"""Settings that came after the first ids were given, with their defaults: what was trained before them."""

SYNTH = {
    "bytes": "synth_bytes",
    "vocabulary": "synth_vocab",
    "zipf_milli": "synth_zipf_milli",
    "order": "synth_order",
    "branching": "synth_branching",
    "copy_permille": "synth_copy_permille",
    "nesting": "synth_nesting",
    "flip_ppm": "synth_flip_ppm",
    "burst_permille": "synth_burst_permille",
    "duplicate_permille": "synth_duplicate_permille",
    "alphabet_permille": "synth_alphabet_permille",
    "tail_milli": "synth_tail_milli",
}
"""Settings of `data.synthetic`, and the names below `data` that they had at first."""


def test_the_default_trial_keeps_its_id():
    # defaults stay out of the hash: changing one silently changes what old ids mean, and needs a new FORMAT_VERSION
    assert cfg.FORMAT_VERSION == 1
    assert cfg.trial_id(TrialConfig(), "0" * 16) == "7b1826b0e7"
    first = cfg.to_dict(TrialConfig())
    first["data"] |= {SYNTH[name]: value for name, value in first["data"].pop("synthetic").items()}
    for name, default in LATER.items():
        group, key = name.split(".")
        assert first[group].pop(key) == default
    assert first.pop("objective") == {}
    assert first["train"]["compile"] == "off"
    first["train"]["compile"] = False  # as it was spelt before there was auto
    defaults = json.dumps(first, sort_keys=True)
    assert hashlib.sha256(defaults.encode()).hexdigest()[:16] == "b4c4043b17169f56"


OLD_IDS = [
    # below data as settings were called at commit a681208: id for a fingerprint of f * 16, fingerprint of the text
    ({}, "72776e9ab2", "77ff2e522076f5a2"),
    ({"synth_bytes": 5000}, "62775c374d", "11fa8558736c0e54"),
    ({"synth_vocab": 300}, "5f1299bc8e", "4fb758d16ac302f9"),
    ({"synth_zipf_milli": 800}, "431ba9ab81", "1438bd5593e9065e"),
    ({"synth_order": 2}, "87f253c8a4", "bc62aa2707fbbde8"),
    ({"synth_branching": 16}, "594bedb4aa", "06c770b078071383"),
    ({"synth_copy_permille": 20}, "7d7e0c4279", "5cdf970018b43bbf"),
    ({"synth_nesting": 2}, "1027d2b5cd", "3ad0c4c6963c2281"),
    ({"synth_flip_ppm": 10}, "c6269c190d", "14c9d997b973e2a0"),
    ({"synth_burst_permille": 3}, "84bb7621a3", "5935ebf0bdf7e1b5"),
    ({"synth_duplicate_permille": 4}, "1e2f9bdea1", "098267cfcdc6d890"),
    ({"synth_alphabet_permille": 5}, "752ec43d88", "386080208abca13d"),
    ({"synth_tail_milli": 900}, "11a11f5f5f", "edacca61b6b7550e"),
    ({"synth_flip_ppm": 1000}, "33f590dc70", "9f6b0ce96482eda6"),
    ({"synth_burst_permille": 20}, "a38a48e6ae", "01ec8a639f8960db"),
    ({"synth_duplicate_permille": 300}, "2438f529bc", "3ea8b3f1eac0b76f"),
    ({"synth_alphabet_permille": 100}, "be24b698c9", "34cdbe501c4339b7"),
    ({"synth_tail_milli": 3000}, "d697b7dc53", "3d908c16c761747d"),
]
"""The synthetic source alone, each of its knobs, and the presets; ids and fingerprints that this commit gave."""


@pytest.mark.parametrize(("old", "trial_id", "fingerprint"), OLD_IDS)
def test_renamed_settings_keep_the_ids_and_fingerprints_of_their_time(
    old: dict[str, int], trial_id: str, fingerprint: str
):
    now = {name: name_then for name, name_then in SYNTH.items() if name_then in old}
    written = {"data": {"source": "synthetic", **old}}
    config = cfg.from_dict({"data": {"source": "synthetic", "synthetic": {n: old[then] for n, then in now.items()}}})
    assert cfg.stored(written) == cfg.stored(cfg.to_dict(config)) == config
    assert cfg.trial_id(config, "f" * 16) == trial_id
    assert sources.fingerprint(config.data) == fingerprint
    assert json.loads(cfg.canonical(config, ""))["settings"] == {
        "data.source": "synthetic", **{f"data.{name}": value for name, value in old.items()}
    }  # fmt: skip


def test_other_ids_of_their_time():
    """Of the same commit: what no renaming touches."""
    hub = {"source": "hf", "path": "allenai/c4", "hub_config": "en"}
    muon = {"kind": "muon", "lr": 0.02, "muon_lr": 0.02, "clip_kind": "zclip"}
    known = {"145f329f8f": {}, "9f274e776d": {"optim": {"lr": 0.01}, "seed": 3}, "d33d971353": {"data": hub}}
    known |= {"6569ff7867": {"optim": muon}}
    assert {cfg.trial_id(cfg.from_dict(values), "f" * 16): values for values in known.values()} == known


def test_all_renamed_settings_at_once_keep_their_id():
    old = {k: v for values, _, _ in OLD_IDS[1:13] for k, v in values.items()}
    assert set(old) == set(SYNTH.values())
    config = cfg.stored({"data": {"source": "synthetic", **old}, "optim": {"lr": 0.01}, "seed": 3})
    assert cfg.trial_id(config, "f" * 16) == "161cee2192"
    assert {n: v for n, v in cfg.flat(config).items() if n.startswith("data.synthetic.")} == {
        f"data.synthetic.{name}": old[then] for name, then in SYNTH.items()
    }


@pytest.mark.parametrize(("name", "then"), SYNTH.items())
def test_a_former_name_is_read_on_disk_and_refused_elsewhere(name: str, then: str):
    assert cfg.FORMER_NAMES[f"data.synthetic.{name}"] == f"data.{then}"
    line = f"data.{then}: is not a setting (did you mean data.synthetic.{name}?)"
    assert problems_of({"data": {"source": "synthetic", then: 5}}) == [line]


def test_renaming_hides_no_misspelt_setting_of_a_file():
    with pytest.raises(ConfigError, match=r"^data.synth_vocabs: is not a setting"):
        cfg.stored({"data": {"synth_vocabs": 5}})
    with pytest.raises(ConfigError, match=r"^data: must be a mapping of settings, got 3$"):
        cfg.stored({"data": 3})


def test_the_id_is_the_documented_hash():
    config = dataclasses.replace(TrialConfig(), optim=OptimConfig(lr=0.01), seed=3)
    body = '{"data_fingerprint":"abc","format":1,"settings":{"optim.lr":0.01,"seed":3}}'
    assert cfg.canonical(config, "abc") == body
    assert cfg.trial_id(config, "abc") == hashlib.sha256(body.encode()).hexdigest()[:10]


def test_zclip_has_another_id_than_when_it_was_not_held_to_the_clip():
    """Its trials of then are not those of now. Every other rule keeps the plain hash."""
    for kind, name in (("zclip", "zclip, capped"), ("adagc", "adagc")):
        config = dataclasses.replace(TrialConfig(), optim=OptimConfig(clip_kind=kind))
        body = f'{{"data_fingerprint":"abc","format":1,"settings":{{"optim.clip_kind":"{name}"}}}}'
        assert cfg.trial_id(config, "abc") == hashlib.sha256(body.encode()).hexdigest()[:10]


def test_seeds_of_a_cell_share_its_id_and_nothing_else_does():
    one, other = (dataclasses.replace(TrialConfig(), seed=s) for s in (1, 2))
    assert cfg.cell_id(one, "f") == cfg.cell_id(other, "f")
    assert cfg.trial_id(one, "f") != cfg.trial_id(other, "f")
    assert cfg.cell_id(one, "f") != cfg.cell_id(one, "g")
    assert cfg.cell_id(dataclasses.replace(one, optim=OptimConfig(lr=0.1)), "f") != cfg.cell_id(one, "f")


@pytest.mark.parametrize(
    ("said", "same"),
    [
        ({"train": {"batch_size": 8, "micro_batch_size": 8}}, {"train": {"batch_size": 8}}),
        ({"model": {"n_kv_heads": 4}}, {"model": {}}),
        ({"optim": {"lr": 1}}, {"optim": {"lr": 1.0}}),
        ({"optim": {"lr": "1e-3"}}, {"optim": {"lr": 0.001}}),
        ({"optim": {"lr": 3e-3, "clip": 1.0}}, {"optim": {"clip": 1.0, "lr": 3e-3}}),
        ({"optim": {"warmup_steps": None, "warmup_share": 0.1}}, {}),
        (
            {"optim": {"warmup_steps": None, "warmup_share": 0.133}, "train": {"steps": 150}},
            {"optim": {"warmup_steps": 20}, "train": {"steps": 150}},
        ),
        ({"optim": {"kind": "muon", "lr": 0.02, "muon_lr": 0.02}}, {"optim": {"kind": "muon", "lr": 0.02}}),
    ],
)
def test_what_trains_alike_has_one_id(said: dict[str, Any], same: dict[str, Any]):
    assert cfg.trial_id(cfg.from_dict(said), "f") == cfg.trial_id(cfg.from_dict(same), "f")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "optim": st.fixed_dictionaries(
                {"lr": st.floats(1e-6, 10)}, optional={"clip": st.none() | st.floats(1e-3, 100)}
            ),
            "model": st.fixed_dictionaries({"depth": st.integers(1, 64)}),
            "train": st.fixed_dictionaries({"steps": st.integers(20, 500), "batch_size": st.integers(1, 64)}),
            "seed": st.integers(0, 2**63 - 1),
        },
    )
)
def test_round_trip_and_key_order(values: dict[str, Any]):
    config = cfg.from_dict(values)
    written = cfg.to_dict(config)
    assert cfg.from_dict(json.loads(json.dumps(written))) == config
    backwards = {k: dict(reversed(v.items())) if isinstance(v, dict) else v for k, v in reversed(written.items())}
    assert cfg.trial_id(cfg.from_dict(backwards), "f") == cfg.trial_id(config, "f")


def test_flat_names_every_setting_once_with_derived_defaults():
    flat = cfg.flat(TrialConfig())
    assert list(flat) == cfg.setting_names()
    assert (flat["model.n_kv_heads"], flat["train.micro_batch_size"]) == (4, 8)


# rules

QWEN3, GEMMA3 = ({"family": family, **cfg.OF_FAMILY[family]} for family in ("qwen3", "gemma3"))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"optim": {"lrr": 1}}, "optim.lrr: is not a setting (did you mean optim.lr, optim.lr_rule?)"),
        ({"model": {"lr": 1}}, "model.lr: is not a setting (did you mean optim.lr?)"),
        ({"optm": {}}, "optm: is not a setting (did you mean optim?)"),
        ({"optim": 3}, "optim: must be a mapping of settings, got 3"),
        ({"optim": {"lr": "abc"}}, "optim.lr: must be a finite number in [0, 10], got 'abc'"),
        ({"optim": {"lr": "012"}}, "optim.lr: must be a finite number in [0, 10], got '012'"),
        ({"optim": {"lr": True}}, "optim.lr: must be a finite number in [0, 10], got True"),
        ({"model": {"depth": 3.0}}, "model.depth: must be a whole number in [1, 1e+06], got 3.0"),
        ({"model": {"init": "xavier"}}, "model.init: must be one of lingua,"),
        ({"seed": -1}, "seed: must be a whole number in [0, 9.22337e+18], got -1"),
        ({"model": {"dim": 66}}, "model.dim, model.n_heads: dim must be divisible by n_heads, got 66 and 4"),
        ({"model": {"dim": 12}}, "model.dim, model.n_heads: dim / n_heads must be even (RoPE rotates pairs), got 3"),
        ({"model": {"residual_scale": "deepnorm"}}, "model.residual_scale, model.norm_placement: deepnorm needs"),
        (
            {"model": {"residual_scale": "inverse_depth", "depth": 1}},
            "model.residual_scale, model.depth: inverse_depth has no effect at depth 1",
        ),
        (
            {"model": {"family": "llama", "qk_norm": True}},
            "model.qk_norm: must be false with family llama (set model.qk_norm=false, in a zip where families differ, "
            "or use the preset model=llama), got true",
        ),
        ({"model": {"family": "qwen3"}}, "model.qk_norm: must be true with family qwen3 (set model.qk_norm=true, in a"),
        ({"model": {**QWEN3, "norm_placement": "sandwich"}}, "model.norm_placement: must be pre with family qwen3"),
        ({"model": {**QWEN3, "ffn": "geglu"}}, "model.ffn: must be swiglu with family qwen3"),
        (
            {"model": {**QWEN3, "attn_softcap": 30}},
            "model.attn_softcap: has an effect with family lingua only (sdpa has no cap)",
        ),
        (
            {"model": {**QWEN3, "embed_scale": 8}},
            "model.embed_scale: has an effect with family lingua only (gemma3 multiplies by sqrt(dim)), "
            "got family qwen3",
        ),
        (
            {"model": {**QWEN3, "residual_scale": "inverse_depth"}},
            "model.residual_scale: has an effect with family lingua only, got family qwen3",
        ),
        ({"model": {**GEMMA3, "tied": False}}, "model.tied: must be true with family gemma3"),
        ({"model": {**GEMMA3, "ffn": "swiglu"}}, "model.ffn: must be geglu with family gemma3"),
        ({"model": {**GEMMA3, "qk_norm": False}}, "model.qk_norm: must be true with family gemma3"),
        ({"model": {**GEMMA3, "norm_placement": "pre"}}, "model.norm_placement: must be sandwich with family gemma3"),
        (
            {"model": {**GEMMA3, "embed_scale": 8}},
            "model.embed_scale: has an effect with family lingua only (gemma3 multiplies by sqrt(dim)), "
            "got family gemma3",
        ),
        (
            {"optim": {"decay_share": 0.5}},
            "optim.decay_share: has an effect with schedule wsd only, got schedule cosine",
        ),
        (
            {"optim": {"decay_shape": "cosine"}},
            "optim.decay_shape: has an effect with schedule wsd only, got schedule cosine",
        ),
        ({"optim": {"muon_momentum": 0.9}}, "optim.muon_momentum: has an effect with kind muon only, got kind adamw"),
        ({"optim": {"muon_lr": 0.02}}, "optim.muon_lr: has an effect with kind muon only, got kind adamw"),
        (
            {"optim": {"kind": "muon", "lr": 0, "allow_zero_lr": True, "muon_lr": 0.02}},
            "optim.muon_lr: must be null where optim.lr is 0 (a control trial), got 0.02",
        ),
        (
            {"optim": {"decay_mode": "independent", "lr": 3e-3}},
            "optim.weight_decay, optim.decay_mode: independent decay removes this share of every weight in each "
            "step, without the factor lr: must be at most 0.02 (as strong as 0.1 coupled: 0.0003), got 0.1, "
            "10 % per step",
        ),
        (
            {"optim": {"decay_mode": "independent", "weight_decay": 3}},
            "optim.weight_decay, optim.decay_mode: independent decay removes this share of every weight in each "
            "step, without the factor lr: must be at most 0.02 (as strong as 3 coupled: 0.009), got 3, "
            "300 % per step",
        ),
        (
            {"optim": {"muon_adjust_lr": "original", "kind": "stable_adamw"}},
            "optim.muon_adjust_lr: has an effect with kind muon only, got kind stable_adamw",
        ),
        (
            {"optim": {"kind": "lion", "eps": 1e-6}},
            "optim.eps: has an effect with kinds adamw, stable_adamw, muon only, got kind lion",
        ),
        (
            {"optim": {"base_batch": 8}},
            "optim.base_batch: has an effect with lr_rules sqrt_batch, linear_batch only, got lr_rule none",
        ),
        (
            {"optim": {"lr_rule": "sqrt_batch"}},
            "optim.lr_rule, optim.base_batch: sqrt_batch needs the base_batch that lr is meant for, "
            "got sqrt_batch and null",
        ),
        (
            {"data": {"synthetic": {"bytes": 5000}}},
            "data.synthetic.bytes: has an effect with source synthetic only, got source pysrc",
        ),
        (
            {"data": {"source": "synthetic", "synthetic": {"order": 0, "branching": 7}}},
            "data.synthetic.branching: has an effect with orders 1, 2, 3 only, got order 0",
        ),
        (
            {"data": {"synthetic": {"vocab": 5}}},
            "data.synthetic.vocab: is not a setting (did you mean data.synthetic.vocabulary?)",
        ),
        ({"data": {"flip_ppm": 5}}, "data.flip_ppm: is not a setting (did you mean data.synthetic.flip_ppm?)"),
        ({"data": {"synthetic": 5}}, "data.synthetic: must be a mapping of settings, got 5"),
        (
            {"data": {"source": "synthetic", "synthetic": {"order": 4}}},
            "data.synthetic.order: must be a whole number in [0, 3], got 4",
        ),
        (
            {"data": {"hub_split": "x"}},
            "data.hub_split: has an effect with sources hf, hub_examples only, got source pysrc",
        ),
        (
            {"data": {"path": "x"}},
            "data.path: has an effect with sources text, jsonl, parquet, lingua, hf, examples, hub_examples only, got "
            "source pysrc",
        ),
        ({"data": {"source": "text"}}, "data.path: source text needs a path, got null"),
        ({"optim": {"lr": 1.0, "allow_zero_lr": True}}, "optim.allow_zero_lr: has an effect with lr 0 only, got lr 1"),
        (
            {"optim": {"clip": None, "clip_kind": "zclip"}},
            "optim.clip_kind: has an effect only where optim.clip is on, got zclip and clip null",
        ),
        (
            {"train": {"skip_spikes": True, "steps": 64}},
            "train.skip_spikes, train.steps: skips nothing in the first 64 steps: train.steps must be larger, got 64",
        ),
        (
            {"optim": {"clip": 2.0, "clip_kind": "agc"}},
            "optim.clip: clip_kind agc has bounds of its own: must be 1 (on) or null (off), got 2",
        ),
        (
            {"optim": {"schedule": "inv_sqrt", "warmup_steps": 0}},
            "optim.schedule, optim.warmup_steps: inv_sqrt scales by the warmup",
        ),
        (
            {"optim": {"schedule": "inv_sqrt", "warmup_steps": None, "warmup_share": 0.001}},
            "optim.schedule, optim.warmup_steps: inv_sqrt scales by the warmup",
        ),
        (
            {"optim": {"warmup_share": 0.1}},
            "optim.warmup_steps, optim.warmup_share: set one of them; the other must be null, got 20 and 0.1",
        ),
        (
            {"optim": {"warmup_steps": None}},
            "optim.warmup_steps, optim.warmup_share: set one of them; the other must be null, got null and null",
        ),
    ],
)
def test_a_broken_rule_is_named(values: dict[str, Any], line: str):
    found = problems_of(values)
    assert len(found) == 1 and found[0].startswith(line), found


@pytest.mark.parametrize("family", cfg.OF_FAMILY)
def test_a_family_takes_what_acts_on_it(family: str):
    free = {
        "logit_softcap": 30,
        "init": "scaled",
        "n_kv_heads": 1,
        "multiple_of": 8,
        "ffn_multiplier": 2,
        "norm_eps": 1e-6,
    }
    assert cfg.from_dict({"model": {"family": family, **cfg.OF_FAMILY[family], **free, "tied": True}})


def test_all_problems_come_at_once():
    assert len(problems_of({"optim": {"lr": -1, "eps": 0, "x": 1}, "model": {"depth": 0}, "seed": "a"})) == 5


def test_a_control_trial_may_learn_nothing():
    config = cfg.from_dict({"optim": {"lr": 0, "allow_zero_lr": True}})
    assert config.optim.lr == 0


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt_batch", 2.0), ("linear_batch", 4.0)])
def test_the_peak_learning_rate_follows_its_rule(rule: str, factor: float):
    base = None if rule == "none" else 8
    config = cfg.from_dict({"optim": {"lr": 0.003, "lr_rule": rule, "base_batch": base}, "train": {"batch_size": 32}})
    assert config.peak_lr == 0.003 * factor


@pytest.mark.parametrize(
    ("optim", "per_step", "timescale"),
    [
        ({"lr": 3e-3, "weight_decay": 0.1}, 3e-4, 3333.333),
        ({"lr": 1.0, "weight_decay": 1.0}, 1.0, 1.0),  # coupled is refused nothing
        ({"lr": 3e-3, "weight_decay": 0.02, "decay_mode": "independent"}, 0.02, 50.0),
        ({"lr": 0.3, "weight_decay": 1e-4, "decay_mode": "independent"}, 1e-4, 10_000.0),
        ({"lr": 1e-3, "lr_rule": "linear_batch", "base_batch": 2, "weight_decay": 0.1}, 4e-4, 2500.0),
        ({"kind": "muon", "lr": 3e-4, "muon_lr": 0.02, "weight_decay": 0.1}, 2e-3, 500.0),
        ({"kind": "muon", "lr": 3e-4, "weight_decay": 0.1}, 3e-5, 33_333.33),
        ({"weight_decay": 0.0}, 0.0, None),
        ({"lr": 0, "allow_zero_lr": True}, 0.0, None),
    ],
)
def test_how_fast_weights_decay(optim: dict[str, Any], per_step: float, timescale: float | None):
    config = cfg.from_dict({"optim": optim})
    assert config.decay_per_step == pytest.approx(per_step, rel=1e-12)
    assert config.decay_timescale == (None if timescale is None else pytest.approx(timescale, rel=1e-6))


def test_a_trial_of_before_a_rule_is_read_and_not_planned():
    values = cfg.to_dict(dataclasses.replace(TrialConfig(), optim=OptimConfig(decay_mode="independent")))
    assert cfg.stored(values).optim.weight_decay == 0.1
    problems_of(values)
    with pytest.raises(ConfigError, match="optim.lr: must be a finite number"):
        cfg.stored({"optim": {"lr": "x"}})


def test_tokens_of_the_final_evaluation():
    def sequences(seq_len: int, tokens: int, least: int = 32) -> int:
        train = {"final_eval_tokens": tokens, "eval_sequences": least}
        return cfg.from_dict({"data": {"seq_len": seq_len}, "train": train}).final_eval_sequences

    assert sequences(32, 16_384) == 512 and sequences(33, 16_384) == 497 and sequences(33, 33 * 497) == 497
    assert sequences(4096, 16_384) == 32 and sequences(128, 1, 1) == 1


@pytest.mark.parametrize(("share", "steps", "warmup"), [(0.133, 150, 20), (0.133, 5, 1), (0.0, 9, 0), (1.0, 9, 9)])
def test_a_warmup_said_as_a_share_is_recorded_in_steps(share: float, steps: int, warmup: int):
    config = cfg.from_dict({"optim": {"warmup_steps": None, "warmup_share": share}, "train": {"steps": steps}})
    assert config.warmup_steps == warmup == cfg.flat(config)["optim.warmup_steps"]
    assert cfg.flat(config)["optim.warmup_share"] == share


def test_long_values_are_shortened():
    assert problems_of({"optim": {"lr": "x" * 5000}})[0].endswith("...")


# sizes: assertions measured on Lingua's own model (without embeddings: V = 0)


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "parameters"),
    [
        (2048, 25, 16, 1_284_610_048),
        (4096, 32, 32, 6_476_271_616),
        (1024, 8, 8, 102_777_856),
        (1024, 10, 8, 128_472_064),
        (128, 4, 4, 1_049_728),
    ],
)
def test_parameter_counts_are_linguas(dim: int, depth: int, heads: int, parameters: int):
    assert ModelConfig(dim=dim, depth=depth, n_heads=heads, multiple_of=256).parameters(0) == parameters


def test_parameter_counts_with_embeddings():
    model = ModelConfig(dim=128, depth=4, n_heads=4, multiple_of=256)
    assert model.parameters(256) == 1_115_264
    assert dataclasses.replace(model, tied=True).parameters(256) == 1_115_264 - 256 * 128


@pytest.mark.parametrize(("dim", "hidden"), [(128, 512), (256, 768), (1024, 2816), (2048, 5632), (4096, 11008)])
def test_ffn_width_is_linguas(dim: int, hidden: int):
    assert ModelConfig(dim=dim, multiple_of=256).ffn_dim == hidden


def test_tokens():
    config = dataclasses.replace(TrialConfig(), train=TrainConfig(steps=10, batch_size=4))
    assert (config.tokens_per_step, config.tokens) == (512, 5120)
