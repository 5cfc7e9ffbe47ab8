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

from stabstudy import config as cfg
from stabstudy import store, sweep
from stabstudy.architecture import ffn_settings
from stabstudy.config import ModelConfig, ObjectiveConfig, TrialConfig
from stabstudy.data import weights
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError, DataError
from stabstudy.stability.rules import Rules
from stabstudy.training import families
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine


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


def foreign(folder: Path, kind: str = "Llama", shard: str = "5GB", **changes: Any) -> Any:
    """A random model of transformers, saved by it; every weight differs, those of norms too."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
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
    start = ObjectiveConfig(init_from=str(place), init_id=source.identity)
    return families.initial(source.model, start, source.vocab or 0, seq_len, seed=0)


@pytest.mark.parametrize("family", ["lingua", "its own"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_model_is_the_same_function(name: str, family: str, tmp_path: Path) -> None:
    theirs = foreign(tmp_path / "hf", **FOREIGN[name])
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
    path.write_text(json.dumps(known))
    with pytest.raises(DataError, match="must be lingua or llama"):
        weights.find(str(tmp_path), tmp_path, "qwen3")
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
