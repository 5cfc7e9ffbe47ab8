"""A recipe for other programs: each setting is carried by a key or named in a note, and their own readers accept it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planted
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from stabstudy import config as cfg
from stabstudy.analysis import recipe
from stabstudy.analysis.elements import Code
from stabstudy.analysis.report import methods, recipe_formats
from stabstudy.analysis.study import Study
from stabstudy.config import PRECISIONS
from stabstudy.planning.plan import make_plan
from stabstudy.settings import ConfigError

Dotted = dict[str, Any]


def tree(flat: Dotted) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        (groups.setdefault(group, {}) if group else groups)[key] = value
    return groups


def settings(flat: Dotted) -> Dotted:
    return cfg.flat(cfg.from_dict(tree(flat)))


def leaves(nest: dict[str, Any], above: str = "") -> Dotted:
    flat: Dotted = {}
    for key, value in nest.items():
        flat |= leaves(value, f"{above}{key}.") if isinstance(value, dict) else {above + key: value}
    return flat


# every setting of a config, off its default


@dataclasses.dataclass(frozen=True)
class Case:
    """A value off the default, and the keys with their values that carry it; None: no key does, so a note has to."""

    value: Any
    lingua: Dotted | None = None
    trainer: Dotted | None = None
    beside: Dotted = dataclasses.field(default_factory=dict)  # what a rule between settings asks for


MUON, WSD, WEAK = {"optim.kind": "muon"}, {"optim.schedule": "wsd"}, {"optim.weight_decay": 0.01}
GEMMA = {"model.qk_norm": True, "model.norm_placement": "sandwich", "model.ffn": "geglu", "model.tied": True}
GRADED = {"data.source": "arithmetic_graded", "data.layout": "padded"}
KTO = GRADED | {"objective.kind": "kto"}
CASES = {
    "objective.kind": [Case("sft", beside={"data.source": "arithmetic"}), Case("kto", beside=GRADED)],
    "objective.beta": [Case(0.5, beside=KTO)],
    "objective.desirable": [Case(1.3, beside=KTO)],
    "objective.undesirable": [Case(1.3, beside=KTO)],
    "objective.init_id": [Case("0123456789", beside={"objective.init_from": "results/a/0123456789"})],
    "data.layout": [Case("padded", beside={"objective.kind": "sft", "data.source": "arithmetic"})],
    "data.labels": [Case(True, beside=KTO | {"data.source": "examples", "data.path": "rows.json"})],
    "model.family": [Case("llama"), Case("qwen3", beside={"model.qk_norm": True}), Case("gemma3", beside=GEMMA)],
    "model.depth": [Case(6, {"model.n_layers": 6})],
    "model.dim": [Case(128, {"model.dim": 128})],
    "model.n_heads": [Case(8, {"model.n_heads": 8, "model.n_kv_heads": 8})],
    "model.n_kv_heads": [Case(2, {"model.n_kv_heads": 2})],
    "model.ffn_multiplier": [Case(1.5, {"model.ffn_dim_multiplier": 1.5})],
    "model.multiple_of": [Case(64, {"model.multiple_of": 64})],
    "model.norm_eps": [Case(1e-6, {"model.norm_eps": 1e-6})],
    "model.rope_theta": [Case(1e5, {"model.rope_theta": 1e5})],
    "model.qk_norm": [Case(True)],
    "model.init": [
        Case("lingua_global_depth", {"model.init_std_factor": "global_depth"}),
        Case("lingua_current_depth", {"model.init_std_factor": "current_depth"}),
        Case("lingua_dim_ratio", {"model.init_std_factor": "dim_ratio"}),
        Case("normal_002", {"model.init_base_std": 0.02}),
        Case("scaled", {"model.init_base_std": 0.02, "model.init_std_factor": "global_depth"}),
    ],
    "model.tied": [Case(True, {"model.weight_tying": True})],
    "model.logit_softcap": [Case(30.0)],
    "model.attn_softcap": [Case(50.0)],
    "model.embed_scale": [Case(8.0)],
    "model.norm_placement": [Case("reordered"), Case("sandwich"), Case("post")],
    "model.ffn": [Case("squared_relu"), Case("gelu"), Case("geglu")],
    "model.residual_scale": [Case("inverse_depth"), Case("deepnorm", beside={"model.norm_placement": "post"})],
    "optim.kind": [
        Case("stable_adamw", trainer={"optim": "stable_adamw"}),
        Case("muon"),
        Case("lion", trainer={"optim": "lion_32bit"}),
    ],
    "optim.lr": [Case(1e-3, {"optim.lr": 1e-3}, {"learning_rate": 1e-3})],
    "optim.lr_rule": [
        Case("sqrt_batch", {"optim.lr": 0.006}, {"learning_rate": 0.006}, {"optim.base_batch": 2}),
        Case("linear_batch", {"optim.lr": 0.012}, {"learning_rate": 0.012}, {"optim.base_batch": 2}),
    ],
    "optim.base_batch": [
        Case(2, {"optim.lr": 0.006}, {"learning_rate": 0.006}, {"optim.lr_rule": "sqrt_batch"}),
    ],
    "optim.weight_decay": [
        Case(0.05, {"optim.weight_decay": 0.05}, {"weight_decay": 0.05}),
        Case(0.0, {"optim.weight_decay": 0.0}, {"weight_decay": 0.0}),
    ],
    "optim.decay_mode": [
        Case("independent", {"optim.weight_decay": 0.01 / 3e-3}, {"weight_decay": 0.01 / 3e-3}, WEAK),
    ],
    "optim.decay_params": [Case("matrices_no_embed"), Case("all")],
    "optim.beta1": [Case(0.8, {"optim.beta1": 0.8}, {"adam_beta1": 0.8})],
    "optim.beta2": [Case(0.99, {"optim.beta2": 0.99}, {"adam_beta2": 0.99})],
    "optim.eps": [Case(1e-6, {"optim.epsilon": 1e-6}, {"adam_epsilon": 1e-6})],
    "optim.muon_momentum": [Case(0.9, beside=MUON)],
    "optim.muon_adjust_lr": [Case("original", beside=MUON)],
    "optim.muon_lr": [Case(0.02, beside=MUON)],
    "optim.warmup_steps": [
        Case(40, {"optim.warmup": 40}, {"warmup_steps": 40}),
        Case(0, {"optim.warmup": 0}, {"warmup_steps": 0}),
    ],
    "optim.warmup_share": [Case(0.2, {"optim.warmup": 40}, {"warmup_steps": 40}, {"optim.warmup_steps": None})],
    "optim.schedule": [
        Case(
            "constant",
            {"optim.scheduler": "wsd", "optim.decay_fraction": 0.0},
            {"lr_scheduler_type": "constant_with_warmup"},
        ),
        Case(
            "linear",
            {"optim.scheduler": "linear"},
            {
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs.lr_end": 3e-4,
                "lr_scheduler_kwargs.power": 1.0,
            },
        ),
        Case(
            "wsd",
            {"optim.scheduler": "wsd", "optim.decay_fraction": 18 / 200},
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs.num_decay_steps": 18,
                "lr_scheduler_kwargs.decay_type": "linear",
                "lr_scheduler_kwargs.min_lr_ratio": 0.1,
            },
        ),
        Case("inv_sqrt", {"optim.scheduler": "inv_sqrt"}, {"lr_scheduler_type": "inverse_sqrt"}),
    ],
    "optim.min_lr_ratio": [
        Case(0.2, {"optim.lr_min_ratio": 0.2}, {"lr_scheduler_kwargs.min_lr_rate": 0.2}),
        Case(0.5, {"optim.lr_min_ratio": 0.5}, None, {"optim.schedule": "inv_sqrt"}),
        Case(0.0, {"optim.lr_min_ratio": 0.01}, {"lr_scheduler_kwargs.min_lr_ratio": 0.0}, WSD),
    ],
    "optim.decay_share": [
        Case(0.5, {"optim.decay_fraction": 0.45}, {"lr_scheduler_kwargs.num_decay_steps": 90}, WSD),
    ],
    "optim.decay_shape": [
        Case("cosine", None, {"lr_scheduler_kwargs.decay_type": "cosine"}, WSD),
        Case("one_minus_sqrt", None, {"lr_scheduler_kwargs.decay_type": "1-sqrt"}, WSD),
    ],
    "optim.clip": [
        Case(0.5, {"optim.clip": 0.5}, {"max_grad_norm": 0.5}),
        Case(None, {"optim.clip": math.inf}, {"max_grad_norm": 0.0}),
    ],
    "optim.clip_kind": [
        Case("zclip"),
        Case("adagc"),
        Case("agc", {"optim.clip": math.inf}, {"max_grad_norm": 0.0}),
    ],
    "data.seq_len": [Case(256, {"data.seq_len": 256})],
    "train.steps": [Case(300, {"steps": 300}, {"max_steps": 300})],
    "train.batch_size": [Case(16, {"data.batch_size": 16}, {"per_device_train_batch_size": 16})],
    "train.micro_batch_size": [
        Case(
            2,
            {"data.batch_size": 2, "grad_acc_steps": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        ),
    ],
    "train.precision": [
        Case("fp16", {"distributed.model_dtype": "fp16"}, {"fp16": True}),
        *(Case(p, {"distributed.model_dtype": "bf16"}, {"bf16": True}) for p in PRECISIONS if p.startswith("bf16")),
    ],
    "train.z_loss": [Case(1e-4)],
    "train.skip_nonfinite": [Case(True)],
    "train.skip_spikes": [Case(True)],
}

NOWHERE = {
    "the corpus and its tokens are the reader's own": (
        *("data.source", "data.path", "data.files", "data.text_column", "data.max_bytes", "data.bad_rows"),
        *(
            "data.tokenizer",
            "data.hub_config",
            "data.hub_split",
            "data.hub_revision",
            "data.synthetic.bytes",
            "data.synthetic.vocabulary",
        ),
        *(
            "data.synthetic.zipf_milli",
            "data.synthetic.order",
            "data.synthetic.branching",
            "data.synthetic.copy_permille",
        ),
        *(
            "data.synthetic.nesting",
            "data.synthetic.flip_ppm",
            "data.synthetic.burst_permille",
            "data.synthetic.duplicate_permille",
        ),
        *("data.synthetic.alphabet_permille", "data.synthetic.tail_milli"),
    ),
    "of how a trial is evaluated and measured, not of how it trains": (
        *("data.validation_share", "train.eval_every", "train.eval_sequences", "train.final_eval_tokens"),
        "train.probe_every",
    ),
    "of speed and safety": ("train.compile", "train.checkpoint_every"),
    "a recipe is meant for every seed": ("seed",),
    "a place: objective.init_id says whose the weights are": ("objective.init_from",),
    "only permits a learning rate of 0": ("optim.allow_zero_lr",),
}
"""Settings that no recipe carries, by the reason."""


def shortfall(
    name: str, case: Case, exporter: Callable[[Dotted], recipe_formats.Export], carrying: Dotted | None
) -> str:
    """What is wrong with how the setting is exported; '': nothing."""
    off, default = settings({**case.beside, name: case.value}), settings({})
    with contextlib.suppress(ConfigError):  # what stands beside it may not be legal without it
        default = settings(case.beside)
    assert off[name] != default[name], "the table has the default itself"
    (text, notes), (usual, usual_notes) = exporter(off), exporter(default)
    body, before = leaves(yaml.safe_load(text)), leaves(yaml.safe_load(usual))
    changed = {k: v for k, v in body.items() if k not in before or before[k] != v}
    carrying = carrying or {}
    if changed.keys() != carrying.keys() or any(changed[k] != close(v) for k, v in carrying.items()):
        return f"{name}={case.value}: the keys {changed} and not {carrying}"
    about = re.compile(rf"\b{re.escape(name)}=")
    now, before_it = ([note for note in some if about.search(note)] for some in (notes, usual_notes))
    return "" if carrying or now != before_it else f"{name}={case.value}: neither a key nor a note"


def close(value: Any) -> Any:
    return pytest.approx(value, rel=1e-12) if isinstance(value, float) else value


def shortfalls(name: str) -> Iterator[str]:
    if any(name in names for names in NOWHERE.values()):
        return
    if name not in CASES:
        yield f"{name}: decide how recipes for others carry it, or why they do not"
    for case in CASES.get(name, []):
        yield from filter(None, [shortfall(name, case, recipe_formats.lingua, case.lingua)])
        yield from filter(None, [shortfall(name, case, recipe_formats.hugging_face, case.trainer)])


@pytest.mark.parametrize("name", cfg.setting_names())
def test_a_key_carries_each_setting_or_a_note_names_it(name: str) -> None:
    assert list(shortfalls(name)) == []


def test_every_choice_is_tried() -> None:
    nowhere = {name for names in NOWHERE.values() for name in names}
    for name, field in cfg.SETTINGS.items():
        if "choices" in field.metadata and name not in nowhere:
            assert {c.value for c in CASES[name]} == set(field.metadata["choices"]) - {field.default}, name


def test_the_walk_notices_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(shortfalls("optim.invented")) != []
    monkeypatch.setattr(recipe_formats, "lingua", lambda s: ("steps: 200", []))
    assert len(list(shortfalls("optim.lr"))) == len(list(shortfalls("model.qk_norm"))) == 1
    monkeypatch.setattr(
        recipe_formats, "lingua", lambda s: ("steps: 200", [f"optim.lr={s['optim.lr']}: a note of another"])
    )
    assert len(list(shortfalls("optim.lr"))) == len(list(shortfalls("model.qk_norm"))) == 1


# their own readers


LINGUA: dict[str, tuple[Any, Any]] = {
    "steps": (int, 1000),
    "grad_acc_steps": (int, 1),
    "optim.lr": (float, 3e-4),
    "optim.weight_decay": (float, 0.1),
    "optim.epsilon": (float, 1e-8),
    "optim.beta1": (float, 0.9),
    "optim.beta2": (float, 0.95),
    "optim.clip": (float, 1.0),
    "optim.scheduler": (str, "cosine"),
    "optim.warmup": (int, 2000),
    "optim.lr_min_ratio": (float, 0.1),
    "optim.decay_fraction": (float, 0.1),
    "model.dim": (int, 512),
    "model.n_layers": (int, 8),
    "model.n_heads": (int | None, None),
    "model.n_kv_heads": (int | None, None),
    "model.ffn_dim_multiplier": (float | None, None),
    "model.multiple_of": (int, 256),
    "model.norm_eps": (float, 1e-5),
    "model.rope_theta": (float, 10000.0),
    "model.weight_tying": (bool, False),
    "model.init_std_factor": (str, "disabled"),
    "model.init_base_std": (float | None, None),
    "data.batch_size": (int, 2),
    "data.seq_len": (int, 2048),
    "distributed.model_dtype": (str, "bf16"),
    "logging.freq": (int, 10),
}
"""Keys of Lingua's config at commit 437d680: type and default."""


def lingua_reader() -> Any:
    """A typed config with those keys alone, as Lingua merges its file into."""
    groups: dict[str, list[Any]] = {}
    for name, (kind, default) in LINGUA.items():
        group, _, key = name.rpartition(".")
        groups.setdefault(group, []).append((key, kind, dataclasses.field(default=default)))
    own = groups.pop("")
    for group, keys in groups.items():
        cls = dataclasses.make_dataclass(group, keys)
        own.append((group, cls, dataclasses.field(default_factory=cls)))
    return OmegaConf.structured(dataclasses.make_dataclass("Arguments", own))


def all_cases() -> Iterator[Dotted]:
    for name, cases in CASES.items():
        if name in cfg.setting_names():
            yield from (settings({**case.beside, name: case.value}) for case in cases)


def test_lingua_reads_its_keys() -> None:
    base = lingua_reader()
    for s in all_cases():
        text, _ = recipe_formats.lingua(s)
        mine, theirs = leaves(yaml.safe_load(text)), leaves(OmegaConf.to_container(OmegaConf.create(text)))  # type: ignore[arg-type]
        assert mine == theirs and set(LINGUA) - set(mine) <= {"optim.decay_fraction"}
        for name, value in mine.items():
            assert type(theirs[name]) is type(value) and isinstance(value, LINGUA[name][0]), (name, value)
        merged = leaves(OmegaConf.to_container(OmegaConf.merge(base, OmegaConf.create(text))))  # type: ignore[arg-type]
        assert merged | mine == merged
        assert merged["optim.decay_fraction"] < 1 and merged["model.init_std_factor"] in STD_FACTORS


STD_FACTORS = {"disabled", "global_depth", "current_depth", "dim_ratio"}


@pytest.mark.parametrize("wrong", ["optim: {decay: 1.0}", "model: {dim: wide}", "warmup: 3"])
def test_the_reader_refuses_what_lingua_does(wrong: str) -> None:
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.merge(lingua_reader(), OmegaConf.create(wrong))


def test_transformers_builds_its_arguments() -> None:
    for s in all_cases():
        text, _ = recipe_formats.hugging_face(s)
        body = yaml.safe_load(text)
        assert OmegaConf.to_container(OmegaConf.create(text)) == body
        built = TrainingArguments(**body, use_cpu=True)  # else it refuses bf16 where no GPU is
        for key, value in body.items():
            assert getattr(built, key) == value and isinstance(getattr(built, key), type(value)), key
        assert built.get_warmup_steps(built.max_steps) == s["optim.warmup_steps"]
        per_step = built.per_device_train_batch_size * built.gradient_accumulation_steps
        assert per_step == s["train.batch_size"]


# values


def test_the_overrides_give_the_same_trial(tmp_path: Path) -> None:
    words = ["model.depth=6", "optim.lr=3e-3", "optim.clip=null", "seeds=1"]  # 3e-3 is the default: yet an axis
    (trial,) = make_plan(words, tmp_path).trials
    levels = {"model.depth": 6, "optim.lr": 3e-3, "optim.clip": None}
    own = {k: v for k, v in cfg.flat(trial.config).items() if k != "seed"}
    (again,) = make_plan([*recipe_formats.overrides(levels, own), "seeds=1"], tmp_path).trials
    assert again.trial_id == trial.trial_id


def test_overrides_say_a_share_of_warmup_in_steps(tmp_path: Path) -> None:
    share = {"optim.warmup_steps": None, "optim.warmup_share": 0.1, "train.steps": 60}
    (trial,) = make_plan([*recipe_formats.overrides({"model.depth": 2}, settings(share)), "seeds=1"], tmp_path).trials
    assert trial.config.warmup_steps == 6


@pytest.mark.parametrize(
    "value",
    ["on", "off", "yes", "null", "true", "nan", "1e-3", "12", "0x1f", "1_000", "12:30", "~", "", "a b", "a/b.json"]
    + ["1-sqrt", "zh-é", "sample-10BT", True, False, None, 1, 0, -3, 1e-3, 1e-8, 3e22, 0.1, 5.0, math.inf],
)
def test_every_reader_takes_a_value_for_what_it_is(value: Any) -> None:
    text = recipe_formats.yaml_scalar(value)
    read = [yaml.safe_load(f"k: {text}")["k"], OmegaConf.create(f"k: {text}").k]
    if value != math.inf:  # which Hydra spells inf; no setting has it
        read.append(OverridesParser.create().parse_override(f"+k={text}").value())
    for one in read:
        assert str(one) == str(value) and isinstance(one, str) == isinstance(value, str), read
        assert type(one) is type(value) or isinstance(value, str)


def test_no_control_character_comes_out() -> None:
    text = recipe_formats.yaml_scalar("a\u202e\n\x1bé")
    assert text.isprintable() and yaml.safe_load(text) == "a\u202e\n\x1bé"


# what notes say


def notes(exporter: Callable[[Dotted], recipe_formats.Export], **own: Any) -> str:
    return "\n".join(exporter(settings({k.replace("__", "."): v for k, v in own.items()}))[1])


def test_notes_of_lingua() -> None:
    assert (
        notes(recipe_formats.lingua, optim__decay_params="all", optim__warmup_steps=0, optim__schedule="constant") == ""
    )
    default = notes(recipe_formats.lingua)
    assert "optim.decay_params=matrices: Lingua's weight decay acts on norms too" in default
    assert "embedding" not in default  # ours decays it too
    assert "decay" not in notes(recipe_formats.lingua, optim__weight_decay=0.0)
    constant = notes(recipe_formats.lingua, optim__schedule="constant", optim__warmup_steps=20)
    assert (
        "optim.schedule=constant: Lingua's constant has no warmup; exported as Lingua's wsd without a decay" in constant
    )
    assert "Lingua's wsd divides by it" in notes(recipe_formats.lingua, optim__schedule="wsd", optim__min_lr_ratio=0.0)


def test_notes_on_precision() -> None:
    assert "precision" not in notes(recipe_formats.lingua) + notes(recipe_formats.hugging_face)
    assert "residual stream in fp32" in notes(recipe_formats.lingua, train__precision="bf16")
    assert "precision" not in notes(recipe_formats.hugging_face, train__precision="bf16")  # autocast as ours
    if "bf16_stream" in PRECISIONS:
        assert "precision" not in notes(recipe_formats.lingua, train__precision="bf16_stream")
        assert "residual stream in fp32" in notes(recipe_formats.hugging_face, train__precision="bf16_stream")


@pytest.mark.parametrize("which", ["matrices", "matrices_no_embed", "all"])
def test_who_decays_what(which: str, tmp_path: Path) -> None:
    """Trainer's own groups, and the single one of Lingua, against what decay_params means; a note where they differ."""
    tiny = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(tiny)
    own = settings({"optim.decay_params": which, "optim.weight_decay": 0.03, "optim.beta2": 0.97})
    text, remarks = recipe_formats.hugging_face(own)
    arguments = TrainingArguments(**yaml.safe_load(text), use_cpu=True, output_dir=str(tmp_path))
    groups = Trainer(model=model, args=arguments).create_optimizer().param_groups
    assert all(g["betas"] == (0.9, 0.97) and g["lr"] == own["optim.lr"] for g in groups)
    decayed = {id(p) for g in groups for p in g["params"] if g["weight_decay"] == 0.03}
    trainers = {name for name, p in model.named_parameters() if id(p) in decayed}
    everything = {name for name, _ in model.named_parameters()}
    norms = {name for name in everything if "norm" in name}
    left_out = {"matrices": norms, "matrices_no_embed": norms | {"model.embed_tokens.weight"}, "all": set[str]()}
    meant = everything - left_out[which]
    assert (trainers == meant) != any("optim.decay_params=" in note for note in remarks)
    assert (everything == meant) != ("optim.decay_params=" in notes(recipe_formats.lingua, optim__decay_params=which))


def test_the_page_comments_what_the_keys_leave_out(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(2, 0.01))
    study = Study.load(tmp_path / "s")
    _, *others = [b for b in methods.recipes(study) if isinstance(b, Code)]
    for block, exporter in zip(others, (recipe_formats.lingua, recipe_formats.hugging_face), strict=True):
        text, remarks = exporter(recipe.recipes(study)[0].settings)
        assert yaml.safe_load(block.text) == yaml.safe_load(text)
        first, *comments = [line.lstrip("# ") for line in block.text.splitlines() if line.startswith("#")]
        assert first == "These keys do not reproduce all of it:" and " ".join(comments) == " ".join(remarks)
        assert max(map(len, block.text.splitlines())) <= 110
