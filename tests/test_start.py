"""Starting weights: another trial's end, a sweep that is launched first, Hugging Face folders; their identity."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from trials import BASE, Make, assert_same, records, vary

from stabstudy import cli, store, sweep
from stabstudy import config as cfg
from stabstudy.architecture import ffn_settings
from stabstudy.config import ModelConfig, ObjectiveConfig, TrialConfig
from stabstudy.data import weights
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError, DataError
from stabstudy.stability.rules import Rules
from stabstudy.training import families
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine, Trial


def trained(folder: store.TrialFolder, cache: Path, stop_at: int | None = None) -> None:
    run_pack([folder], Engine(cache, keep_checkpoints=True), Rules(), lambda members: members[0].step == stop_at)


def after(source: store.TrialFolder, **changes: Any) -> TrialConfig:
    """Settings of a trial that starts from the source's end."""
    start = ObjectiveConfig(init_from=str(source.path), init_id=source.trial_id)
    return dataclasses.replace(vary(**changes), objective=start)


@pytest.fixture
def source(make: Make, cache: Path) -> store.TrialFolder:
    folder = make(BASE, "source")
    trained(folder, cache)
    return folder


def test_a_trial_begins_where_its_source_ended(make: Make, cache: Path, source: store.TrialFolder) -> None:
    folder = make(dataclasses.replace(after(source), seed=3))
    trained(folder, cache)
    state, before = folder.read_state(), source.read_state()
    assert state.status == "done" and state.init_loss == before.final_loss
    assert state.init_loss != before.init_loss


# Hugging Face folders

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "initializer_range": 0.2,
}
FOREIGN: dict[str, dict[str, Any]] = {
    "llama": {"kind": "Llama", "tie_word_embeddings": False},
    "llama, tied": {"kind": "Llama", "tie_word_embeddings": True, "intermediate_size": 96},
    "qwen3": {"kind": "Qwen3", "tie_word_embeddings": False},
}
GEMMA: dict[str, Any] = {
    "kind": "Gemma3",
    "tie_word_embeddings": True,
    "layer_types": ["full_attention"] * 2,
    "query_pre_attn_scalar": 8,
    "rope_parameters": {"full_attention": SIZES["rope_parameters"], "sliding_attention": SIZES["rope_parameters"]},
}


def foreign(folder: Path, kind: str = "Llama", shard: str = "5GB", **changes: Any) -> Any:
    """A random model of transformers, saved by it; every weight differs, those of norms too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**SIZES | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def started(place: Path, family: str | None = None, seq_len: int = 16) -> Any:
    """The decoder that a trial makes of a folder."""
    source = weights.find(str(place), Path.cwd(), family)
    return families.initial(source.model, source.vocab or 0, seq_len, 0, str(place), source.identity)


@pytest.mark.parametrize(
    ("name", "family"), [*((name, f) for name in FOREIGN for f in ("lingua", "its own")), ("gemma3", "its own")]
)
def test_a_foreign_model_is_the_same_function(name: str, family: str, tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "hf", **FOREIGN.get(name, GEMMA))
    ours = started(tmp_path / "hf", name.partition(",")[0] if family == "its own" else None)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 67, (3, 16)))
    with torch.no_grad():
        expected, logits = theirs(tokens).logits, ours(tokens)
    assert (expected - logits).abs().max() < 1e-5 and expected.abs().max() > 1


def test_rows_of_queries_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without the other order of rows the function is another one."""
    theirs = foreign(tmp_path / "hf")
    monkeypatch.setattr(families, "pairs", lambda weight, head_dim: weight)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert (theirs(tokens).logits - started(tmp_path / "hf")(tokens)).abs().max() > 1e-2


def test_shards_are_read_and_named_by_their_content(tmp_path: Path) -> None:
    foreign(tmp_path / "one", shard="20KB")
    assert len(weights.files(tmp_path / "one")) > 2
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    first = weights.find("one", tmp_path)
    assert weights.find(str(tmp_path / "two"), tmp_path).identity == first.identity and first.vocab == 67
    file = weights.files(tmp_path / "two")[0]
    tensors = safetensors.torch.load_file(file)
    name = min(tensors)
    safetensors.torch.save_file(tensors | {name: tensors[name] + 1}, file)
    assert weights.find("two", tmp_path).identity != first.identity
    with pytest.raises(DataError, match="are not those of objective.init_id"):
        weights.check_identity("two", first.identity, weights.find("two", tmp_path))
    safetensors.torch.save_file(tensors | {name: tensors[name] / 0}, file)
    with pytest.raises(DataError, match="not finite"):
        weights.check_finite(weights.find("two", tmp_path))


@pytest.mark.parametrize(("dim", "ffn"), [(64, 192), (64, 173), (2048, 8192), (2048, 5632), (896, 4864), (6, 7)])
def test_every_width_has_its_settings(dim: int, ffn: int) -> None:
    multiplier, multiple = ffn_settings(dim, ffn, "swiglu")
    assert ModelConfig(dim=dim, ffn_multiplier=multiplier, multiple_of=multiple).ffn_dim == ffn


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "scaled rope": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "RoPE is scaled"),
    "an older file's": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
        "RoPE is scaled",
    ),
    "bias": ({"attention_bias": True}, "attention_bias is true"),
    "wide heads": ({"head_dim": 16}, "head_dim 16 is not"),
    "another activation": ({"hidden_act": "relu"}, "the activation is relu"),
    "another family": ({"model_type": "mixtral"}, "only the model types"),
    "window": ({"use_sliding_window": True}, "sliding window"),
    "no size": ({"hidden_size": "32"}, "must give hidden_size"),
    "another width": ({"intermediate_size": 46}, "gate_proj.weight must be .46, 32. by config.json"),
    "fewer layers": ({"num_hidden_layers": 1}, "no place for a tensor"),
    "more layers": ({"num_hidden_layers": 3}, "is not in its files"),
}


def test_what_our_layers_cannot_represent_is_refused(tmp_path: Path) -> None:
    foreign(tmp_path)
    path = tmp_path / "config.json"
    known = json.loads(path.read_text())
    for changes, rule in UNLIKE.values():
        path.write_text(json.dumps(known | changes))
        with pytest.raises(DataError, match=rule):
            weights.find(str(tmp_path), tmp_path)
    plain = {key: value for key, value in known.items() if key != "rope_parameters"} | {"rope_theta": 123.0}
    path.write_text(json.dumps(plain))  # as transformers wrote it before version 5
    assert weights.find(str(tmp_path), tmp_path).model.rope_theta == 123.0
    path.write_text(json.dumps(known))
    with pytest.raises(DataError, match="must be lingua or llama"):
        weights.find(str(tmp_path), tmp_path, "qwen3")
    foreign(tmp_path / "gemma", **GEMMA | {"layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(DataError, match="sliding window"):
        weights.find("gemma", tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match="cut off"):
        weights.find(str(tmp_path), tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="run code"):
        weights.find(str(tmp_path), tmp_path)


def test_a_hub_name_is_the_folder_of_its_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(tmp_path / "hf")
    monkeypatch.setattr(weights, "snapshot", lambda name: tmp_path / "hf")
    source = weights.find("someone/tiny@main", tmp_path)
    assert source.place == "someone/tiny@main" and source.tokenizer == "someone/tiny@main"
    assert source.identity == weights.find("hf", tmp_path).identity
    monkeypatch.undo()
    with pytest.raises(DataError, match="HF_HUB_OFFLINE"):
        weights.find("someone/tiny@main", tmp_path)


# trials, packs, resuming


def test_members_of_a_pack_are_each_as_alone(make: Make, cache: Path, source: store.TrialFolder) -> None:
    configs = [dataclasses.replace(after(source, optim={"lr": lr}), seed=i) for i, lr in enumerate((1e-3, 3e-2))]
    packed, alone = ([make(c, name) for c in configs] for name in ("packed", "alone"))
    run_pack(packed, Engine(cache), Rules(), lambda members: False)
    for folder, other in zip(packed, alone, strict=True):
        trained(other, cache)
        assert folder.read_state().init_loss == other.read_state().init_loss == source.read_state().final_loss
        a, b = records(folder)[0], records(other)[0]
        assert np.allclose(a["loss"], b["loss"], rtol=2e-5, atol=0)


def test_resuming_is_bitwise(make: Make, cache: Path, source: store.TrialFolder) -> None:
    whole, halted = make(after(source), "whole"), make(after(source), "halted")
    trained(whole, cache)
    run_pack([halted], Engine(cache), Rules(), lambda members: members[0].step == 5)
    assert halted.read_state().status == "interrupted"
    trained(halted, cache)
    for a, b in zip(records(whole), records(halted), strict=True):
        assert_same(a, b)
    assert len(halted.read_state().attempts) == 2


def test_weights_that_were_replaced_fail_the_trial(make: Make, cache: Path, source: store.TrialFolder) -> None:
    other = make(dataclasses.replace(BASE, seed=9), "source")
    trained(other, cache)
    start = ObjectiveConfig(init_from=str(other.path), init_id=source.trial_id)
    folder = make(dataclasses.replace(BASE, objective=start))
    trained(folder, cache)
    state = folder.read_state()
    assert state.status == "failed" and state.error is not None
    assert f"not those of objective.init_id ({source.trial_id}), got {other.trial_id}" in state.error["message"]
    shutil.rmtree(source.path)
    gone = make(after(source), "gone")
    trained(gone, cache)
    error = gone.read_state().error
    assert error is not None and "there is nothing at this path" in error["message"]
    assert str(source.path) in error["message"]


def test_final_weights_outlive_a_launch_that_keeps_none(source: store.TrialFolder) -> None:
    assert store.tidy_done_trial(source, keep_checkpoints=False) == ["step-00000004", "step-00000008"]
    assert store.tidy_done_trial(source, keep_checkpoints=False) == []
    assert weights.of_trial(source).identity == source.trial_id
    shutil.rmtree(source.final_weights)
    with pytest.raises(DataError, match="kept no final weights: remove its folder"):
        weights.of_trial(source)


def test_only_ends_are_started_from(make: Make, cache: Path, source: store.TrialFolder) -> None:
    file = source.final_weights / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="changed since they were saved"):
        weights.of_trial(source)
    halted = make(dataclasses.replace(BASE, seed=1), "source")
    with pytest.raises(DataError, match="is not finished .pending"):
        weights.of_trial(halted)
    with pytest.raises(DataError, match="the study has 2 trials: name one"):
        weights.find("source", source.path.parents[2])
    diverging = make(vary(optim={"lr": 10.0}, train={"steps": 60}), "diverged")
    trained(diverging, cache)
    with pytest.raises(DataError, match="the trial diverged at step"):
        weights.find("diverged", source.path.parents[2])


# identity


def test_identity_is_no_path() -> None:
    plain = TrialConfig()
    one, other = (
        dataclasses.replace(plain, objective=ObjectiveConfig(init_from=p, init_id="0123456789")) for p in ("/a", "/b")
    )
    assert cfg.trial_id(plain, "0" * 16) == "7b1826b0e7"
    assert cfg.trial_id(one, "0" * 16) == cfg.trial_id(other, "0" * 16) == "5a1487eff7"
    third = dataclasses.replace(plain, objective=ObjectiveConfig(init_from="/a", init_id="sha256:0123456789abcdef"))
    assert cfg.trial_id(third, "0" * 16) != cfg.trial_id(one, "0" * 16) != cfg.trial_id(plain, "0" * 16)


# plans

TINY = ["data=synthetic", "data.synthetic.bytes=40000", "data.seq_len=16", "train.steps=12", "train.batch_size=4"]
TINY += ["train.eval_sequences=6", "optim.warmup_steps=3", "launcher=local", "compute=cpu"]


def plan_of(start: str, *given: str, cwd: Path) -> Plan:
    return make_plan([f"objective.init_from={start}", *TINY, "seeds=1", *given], cwd)


def refusal(start: str, *given: str, cwd: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(start, *given, cwd=cwd)
    return str(caught.value)


def test_a_plan_takes_the_architecture_of_its_source(source: store.TrialFolder, tmp_path: Path) -> None:
    plan = plan_of("source", "optim.lr=1e-3,1e-2", "model.logit_softcap=30.0", cwd=tmp_path)
    first = plan.trials[0].config
    assert first.model == dataclasses.replace(BASE.model, logit_softcap=30.0)
    assert first.objective == ObjectiveConfig(init_from=str(source.path), init_id=source.trial_id)
    assert plan.first == () and len(plan.trials) == 2
    both = plan_of("null,source", "model.depth=2", "model.dim=16", "model.n_heads=2", cwd=tmp_path)
    assert [both.values(trial) for trial in both.trials] == [[None], [source.trial_id]]
    named = plan_of(f"source/{source.trial_id}", f"objective.init_id={source.trial_id}", "model.depth=2", cwd=tmp_path)
    assert named.trials[0].config == dataclasses.replace(first, model=BASE.model, optim=named.trials[0].config.optim)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "source").rename(tmp_path / "elsewhere" / "moved")
    moved = plan_of("elsewhere/moved", "optim.lr=1e-3,1e-2", "model.logit_softcap=30.0", cwd=tmp_path)
    assert [t.trial_id for t in moved.trials] == [t.trial_id for t in plan.trials]


REFUSED: dict[tuple[str, ...], str] = {
    ("model.depth=2,4",): "model.depth: the starting weights have 2 (objective.init_from=source): leave it out, got 4",
    ("model=tiny",): "model.dim: the starting weights have 16 (objective.init_from=source): leave it out, got 64",
    ("model.family=llama",): "model.family: the starting weights have lingua",
    ("model.init=scaled",): "model.init: the starting weights have lingua",
    ("objective.init_id=0123456789",): "objective.init_id: the weights at objective.init_from=source are",
    ("data.tokenizer=VOCAB",): "data.tokenizer: the starting weights have a vocabulary of 258, got VOCAB",
}


@pytest.mark.parametrize("given", REFUSED)
def test_a_plan_refuses_what_says_otherwise(given: tuple[str, ...], source: store.TrialFolder, tmp_path: Path) -> None:
    vocab = tmp_path / "tokenizer.json"
    body: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
    }
    body |= {"pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
    words = {"[EOS]": 0, "a": 1}
    vocab.write_text(json.dumps(body | {"model": {"type": "WordLevel", "vocab": words, "unk_token": "a"}}))
    told = refusal("source", *(g.replace("VOCAB", str(vocab)) for g in given), cwd=tmp_path)
    assert REFUSED[given].replace("VOCAB", str(vocab)) in told


def test_a_plan_refuses_what_is_no_source(tmp_path: Path) -> None:
    assert "there is nothing at this path" in refusal("./nowhere", cwd=tmp_path)
    assert "HF_HUB_OFFLINE is set" in refusal("nowhere", cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "is neither a trial, a study nor a Hugging Face model" in refusal("empty", cwd=tmp_path)
    with pytest.raises(ConfigError, match="the weights and their identity go together"):
        make_plan([*TINY, "objective.init_id=0123456789"], tmp_path)


def test_a_foreign_folder_is_planned(tmp_path: Path) -> None:
    foreign(tmp_path / "hf", vocab_size=258)
    plan = plan_of("hf", cwd=tmp_path)
    config = plan.trials[0].config
    assert config.model.family == "lingua" and config.model.ffn_dim == 45 and config.data.tokenizer == "bytes"
    assert (config.objective.init_id or "").startswith("sha256:")
    assert plan_of("hf", "model.family=llama", cwd=tmp_path).trials[0].config.model.family == "llama"
    (tmp_path / "small").mkdir()
    foreign(tmp_path / "small")
    assert "data.tokenizer: the starting weights have a vocabulary of 67, got bytes with" in refusal(
        "small", cwd=tmp_path
    )
    assert "must be lingua or llama, got gemma3" in refusal("hf", "model.family=gemma3", cwd=tmp_path)


# sweeps that are launched first

BASE_SWEEP = """\
# @package _global_
# What is a base?
defaults:
  - override /data: synthetic
  - override /compute: cpu
data: {seq_len: 16, synthetic: {bytes: 40000}}
model: {depth: 1, dim: 16, n_heads: 2}
optim: {warmup_steps: 3}
train: {steps: 12, batch_size: 4, eval_sequences: 6}
sweep: {seeds: [0]}
"""


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sweeps"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE_SWEEP)
    own = BASE_SWEEP.replace("model: {depth: 1, dim: 16, n_heads: 2}", "objective: {init_from: base}")
    (folder / "tuned.yaml").write_text(own.replace("seeds: [0]", "seeds: [0], grid: {optim.lr: [1e-3, 1e-2]}"))
    (folder / "loop.yaml").write_text(own.replace("init_from: base", "init_from: circle"))
    (folder / "circle.yaml").write_text(own.replace("init_from: base", "init_from: loop"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sweep_of_one_trial_is_planned_with(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source,) = make_plan(["sweep=base"], swept).trials
    plan = make_plan(["sweep=tuned", "results_dir=there"], swept)
    folder = swept / "there" / "base" / "trials" / source.trial_id
    assert {t.config.objective.init_id for t in plan.trials} == {source.trial_id}
    assert {t.config.objective.init_from for t in plan.trials} == {str(folder)}
    assert [t.config.model for t in plan.trials] == [source.config.model] * 2
    assert [p.folder for p in plan.first] == [swept / "there" / "base"] and plan.first[0].compute.keep_checkpoints
    assert sweep.main(["sweep=tuned", "--dry-run"]) == 0
    assert f"weights of sweep=base ({source.trial_id}, to be launched first)" in capsys.readouterr().out
    assert {p.name for p in swept.iterdir()} == {"sweeps"}
    for given, rule in (
        (["sweep=tuned", "objective.init_from=tuned"], "a sweep cannot start from itself, got tuned -> tuned"),
        (["sweep=loop"], "a sweep cannot start from itself, got loop -> circle -> loop"),
        (["sweep=base", "objective.init_from=quickstart"], "must be a sweep of exactly one trial, got quickstart with"),
        (["sweep=tuned", "model.depth=1,2"], "model.depth: the starting weights have 1"),
    ):
        assert sweep.main(given) == 2
        told = capsys.readouterr().err
        assert rule in told and len(told.splitlines()) == 1


@pytest.mark.slow
def test_a_sweep_is_launched_first_and_once(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep=tuned", "launcher=local", f"compute.cache_dir={swept}/cache"]
    assert sweep.main(command) == 0
    assert "first: sweep=base" in capsys.readouterr().out
    source = store.StudyFolder(swept / "results" / "base").trials()[0]
    trials = store.StudyFolder(swept / "results" / "tuned").trials()
    assert [t.read_state().init_loss for t in trials] == [source.read_state().final_loss] * 2
    changed = source.state_file.stat().st_mtime_ns
    assert sweep.main(command) == 0 and source.state_file.stat().st_mtime_ns == changed
    assert "first: " not in capsys.readouterr().out
    assert sweep.main(["sweep=base", *command[1:]]) == 0, "whose launch keeps no checkpoints"
    assert source.final_weights.is_dir()
    (swept / "results" / "base").rename(swept / "moved")
    again = [*command, "objective.init_from=moved", "study=tuned"]
    assert sweep.main(again) == 0 and "nothing to train" in capsys.readouterr().out


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


@pytest.mark.slow
def test_a_sweep_that_fails_stops_the_launch_in_one_line(
    swept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["sweep=tuned", "launcher=local", "compute.retries=0", f"compute.cache_dir={swept}/cache"]
    with monkeypatch.context() as broken:
        broken.setattr(Trial, "finish", lambda self, reason, step, loss: 1 / 0)
        assert sweep.main(command) == cli.PARTIAL
    failure = "error: study: sweep=base failed, and the trials of this launch start from its weights"
    assert errors(capsys) == [failure]
    assert not (swept / "results" / "tuned").exists()
    base = swept / "sweeps" / "base.yaml"
    base.write_text(
        BASE_SWEEP.replace("warmup_steps: 3", "warmup_steps: 3, lr: 10.0").replace("steps: 12", "steps: 60")
    )
    for flags in ([], ["--dry-run"]):  # it diverges now, and has diverged then
        assert sweep.main([*command, "results_dir=other", *flags]) == cli.BAD_INPUT
        (line,) = errors(capsys)
        assert "objective.init_from: the trial diverged at step" in line
    assert not (swept / "other" / "tuned").exists()
