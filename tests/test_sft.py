"""Fine-tuning on completions: the loss of transformers' labels, one normaliser for unequal lengths, whole trials."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from lone import CPU
from numpy.typing import NDArray
from torch import Tensor, nn
from trials import Make, assert_same, records, vary

from stabstudy import store, sweep
from stabstudy.config import OF_FAMILY, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.data.batches import open_batches
from stabstudy.data.layouts import IGNORE, hidden, read_tokens
from stabstudy.stability.rules import Rules
from stabstudy.training import driver, families, probes
from stabstudy.training.loop import Progress
from stabstudy.training.pack import run_pack
from stabstudy.training.step import Stepper
from stabstudy.training.trial import Engine

V, T, B = 61, 16, 8
SFT = ObjectiveConfig("sft")
SHAPE = ModelConfig(depth=2, dim=32, n_heads=4, n_kv_heads=2)
MODELS = {f: dataclasses.replace(SHAPE, family=f, **OF_FAMILY.get(f, {})) for f in ("lingua", "llama", "qwen3")}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def config(model: ModelConfig, micro: int | None = None, **changes: Any) -> TrialConfig:
    train = TrainConfig(batch_size=B, micro_batch_size=micro)
    data = DataConfig(source="arithmetic", seq_len=T)
    made = TrialConfig(model=model, optim=OptimConfig(clip=None), objective=SFT, data=data, train=train)
    return dataclasses.replace(made, **changes)


def stepper_of(made: TrialConfig) -> Stepper:
    return Stepper([made], [families.build(made.model, V, T, seed=1)], CPU)


def windows() -> NDArray[np.int64]:
    """Prompts of 0 to 7 tokens, completions of very unequal lengths, in one sequence none, filled up at the right."""
    made = np.random.default_rng(0).integers(0, V, (B, T + 1))
    for row in range(B):
        prompt, stop = row + 1, min(row + 2 + row * row // 3, T + 1)
        made[row, :prompt] = hidden(made[row, :prompt])
        made[row, stop if row != 3 else prompt :] = IGNORE
    return made


def stepped(made: TrialConfig, batch: NDArray[np.int64]) -> tuple[Stepper, dict[str, float]]:
    """A step at lr 0, and its scalars."""
    stepper = stepper_of(made)
    vector = stepper.step(torch.from_numpy(batch)[None], [0.0], torch.ones(1), masked=True)[0]
    return stepper, dict(zip(stepper.columns, vector.tolist(), strict=False))


def labels_of(batch: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Input ids and labels of [B, T+1] as transformers has them, written a second time."""
    ids, labels = np.zeros_like(batch), np.full_like(batch, -100)
    for i, row in enumerate(batch.tolist()):
        for j, number in enumerate(row):
            ids[i, j] = number if number >= 0 else 0 if number == -100 else -101 - number
            labels[i, j] = number if number >= 0 else -100
    return torch.from_numpy(ids), torch.from_numpy(labels)


def reference(made: TrialConfig, batch: NDArray[np.int64]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by torch's own masked mean, of the whole batch at once."""
    model: Any = families.build(made.model, V, T, seed=1)
    ids, labels = labels_of(batch)
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    parameters = dict(model.named_parameters())
    return loss.item(), dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def far(stepper: Stepper, grads: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to the largest entry of its tensor."""
    pairs = zip(stepper.stack.names, stepper.grads, strict=True)
    return max(((ours[0] - grads[n]).abs().max() / grads[n].abs().max()).item() for n, ours in pairs)


# --- the loss


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradients_are_those_of_transformers_with_labels(family: str) -> None:
    made = config(MODELS[family])
    m = made.model
    shape = {
        "vocab_size": V, "hidden_size": m.dim, "intermediate_size": m.ffn_dim, "num_hidden_layers": m.depth,
        "num_attention_heads": m.n_heads, "num_key_value_heads": m.kv_heads, "head_dim": m.head_dim,
        "max_position_embeddings": T + 1, "rms_norm_eps": m.norm_eps, "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta}, "attn_implementation": "eager",
    }  # fmt: skip
    kind = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    theirs = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**shape))
    stepper, scalars = stepped(made, windows())
    names = {
        n: f"lm_{n}" if n.startswith("head") else f"model.{n.replace('embed.', 'embed_tokens.')}"
        for n in stepper.stack.names
    }
    weights = {names[n]: t[0] for n, t in zip(stepper.stack.names, stepper.stack.tensors, strict=True)}
    assert theirs.load_state_dict(weights, strict=False) == ([], [])
    ids, labels = labels_of(windows())
    expected = theirs(input_ids=ids, labels=labels, attention_mask=(torch.from_numpy(windows()) != IGNORE).long()).loss
    expected.backward()
    assert scalars["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert scalars["targets"] == (labels[:, 1:] != -100).sum()
    given = dict(theirs.named_parameters())
    assert far(stepper, {n: given[names[n]].grad for n in names}) <= 1e-5


@pytest.mark.parametrize("micro", [8, 4, 2, 1])
@each_model
def test_accumulation_changes_nothing_with_unequal_completions(model: ModelConfig, micro: int) -> None:
    loss, grads = reference(config(model), windows())
    stepper, scalars = stepped(config(model, micro), windows())
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads.values()))  # type: ignore[arg-type]
    assert scalars["loss"] == pytest.approx(loss, rel=1e-6)
    assert scalars["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert far(stepper, grads) <= 1e-5


def test_the_mean_of_means_fails_the_same_assertion() -> None:
    whole = reference(config(SHAPE), windows())[1]
    parts = [p for p in np.split(windows(), 4) if (p[:, 1:] >= 0).any()]
    each = [reference(config(SHAPE), p)[1] for p in parts]
    means = {n: sum(g[n] for g in each) / len(each) for n in whole}
    assert max(((means[n] - whole[n]).abs().max() / whole[n].abs().max()).item() for n in whole) > 0.05


def test_the_prompt_is_read_and_is_no_target() -> None:
    """Negative control: prompts whose tokens were lost, or were targets, give another loss."""
    _, right = stepped(config(SHAPE), windows())
    lost, trained = windows(), windows()
    lost[lost < IGNORE] = IGNORE
    trained = np.where(trained == IGNORE, IGNORE, read_tokens(trained))
    for wrong in (lost, trained):
        assert abs(stepped(config(SHAPE), wrong)[1]["loss"] / right["loss"] - 1) > 1e-3


@each_model
def test_a_padded_example_has_the_loss_it_has_alone(model: ModelConfig) -> None:
    stepper, batch = stepper_of(config(model)), windows()
    for row in batch:
        whole = row[row != IGNORE]
        if (whole[1:] >= 0).any():
            padded, alone = (stepper.loss_on(torch.from_numpy(w)[None, None]).item() for w in (row, whole))
            assert padded == pytest.approx(alone, rel=1e-6)


def test_logit_statistics_are_of_completions_alone() -> None:
    made, batch = config(SHAPE), windows()
    model: Any = families.build(made.model, V, T, seed=1)
    ids, labels = labels_of(batch)
    logits = model(ids[:, :-1])[labels[:, 1:] != -100].detach()
    _, scalars = stepped(made, batch)
    assert scalars["logit_absmax"] == pytest.approx(logits.abs().max().item(), rel=1e-6)
    assert scalars["logz_mean"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-6)


# --- whole trials

LAYOUTS = {
    layout: dataclasses.replace(
        vary(train={"steps": 12, "final_eval_tokens": 512}),
        objective=SFT,
        data=DataConfig(source="arithmetic", max_bytes=20_000, seq_len=32, layout=layout),
    )
    for layout in ("packed", "padded")
}
each_layout = pytest.mark.parametrize("made", LAYOUTS.values(), ids=LAYOUTS)


def run(folders: Sequence[store.TrialFolder], cache: Path, heartbeat: Any = None, **engine: Any) -> list[str]:
    ended = run_pack(folders, Engine(cache, **engine), Rules(), heartbeat or (lambda members: False))
    return [state.status for state in ended]


def test_a_pack_trains_each_member_as_it_would_be_alone(make: Make, cache: Path) -> None:
    """Packed and padded members in one pack, too."""
    configs = [dataclasses.replace(c, seed=seed) for seed in (0, 1) for c in LAYOUTS.values()]
    alone, together = ([make(c, name) for c in configs] for name in ("alone", "together"))
    assert [run([folder], cache) for folder in alone] == [["done"]] * 4
    assert run(together, cache) == ["done"] * 4
    for one, other in zip(alone, together, strict=True):
        (a, _), (b, _) = records(one), records(other)
        assert a["tokens"].tolist() == b["tokens"].tolist()
        for name in ("loss", "grad_norm", "logz_mean"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), name
        assert other.read_state().final_loss == pytest.approx(one.read_state().final_loss, rel=1e-5)


@each_layout
def test_tokens_count_targets_and_losses_are_of_completions(made: TrialConfig, make: Make, cache: Path) -> None:
    folder = make(made)
    assert run([folder], cache) == ["done"]
    batches = open_batches(made, cache)
    targets = [int((batches.batch(step)[:, 1:] >= 0).sum()) for step in range(made.train.steps)]
    rows, state = records(folder)[0], folder.read_state()
    assert rows["tokens"].tolist() == np.cumsum(targets).tolist()
    assert state.eval_tokens == (batches.final_evaluation()[:, 1:] >= 0).sum()
    assert state.train_tokens == batches.training_tokens and state.unigram_entropy == batches.unigram_entropy
    stepper = Stepper([made], [families.build(made.model, batches.corpus.vocab_size, 32, made.seed)], CPU)
    first = stepper.step(torch.from_numpy(batches.batch(0))[None], [0.0], torch.ones(1), masked=True)[0]
    assert rows["loss"][0] == pytest.approx(first[stepper.columns.index("loss")].item(), rel=1e-6)
    final = stepper.loss_on(torch.from_numpy(batches.final_evaluation())[None]).item()
    assert state.init_loss == pytest.approx(final, rel=1e-6)
    assert state.final_loss is not None and state.init_loss is not None
    assert state.final_loss < state.init_loss - 0.2


@each_layout
def test_a_trial_that_was_stopped_goes_on_as_if_nothing_had_happened(
    made: TrialConfig, make: Make, cache: Path
) -> None:
    whole, stopped = make(made, "whole"), make(made, "stopped")
    assert run([whole], cache) == ["done"]

    def stop(members: Sequence[Progress]) -> bool:
        return members[0].step >= 7

    assert run([stopped], cache, stop) == ["interrupted"] and run([stopped], cache) == ["done"]
    assert_same(records(whole)[0], records(stopped)[0])


@pytest.mark.parametrize("kind", ["host", "resident"])
@each_layout
def test_captured_steps_read_the_same(
    made: TrialConfig, kind: str, make: Make, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ring of steps, their tables and both feeds; on a CPU the same functions run without a graph."""
    eager, captured = make(made, "eager"), make(made, "captured")
    assert run([eager], cache) == ["done"]
    if kind == "resident":
        monkeypatch.setattr(driver, "HostFeed", driver.ResidentFeed)
    assert run([captured], cache, captured=True, ring=5) == ["done"]
    assert "not captured" not in captured.log_file.read_text()
    (a, _), (b, _) = records(eager), records(captured)
    assert a["tokens"].tolist() == b["tokens"].tolist()
    for name in ("loss", "grad_norm"):
        assert b[name] == pytest.approx(a[name], rel=1e-6), name


def test_packed_and_padded_members_share_a_device(make: Make, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One corpus in two layouts, and another corpus: each member finds its own sequences among those of all."""
    other = dataclasses.replace(LAYOUTS["packed"].data, max_bytes=15_000)
    configs = [*LAYOUTS.values(), dataclasses.replace(LAYOUTS["packed"], data=other)]
    host, resident = ([make(c, name) for c in configs] for name in ("host", "resident"))
    assert run(host, cache) == ["done"] * 3
    monkeypatch.setattr(driver, "HostFeed", driver.ResidentFeed)
    assert run(resident, cache) == ["done"] * 3
    for one, another in zip(host, resident, strict=True):
        assert_same(records(one)[0], records(another)[0])


def of_long_prompts(folder: Path, **train: Any) -> TrialConfig:
    """Most sequences of 16 tokens have no token of a completion."""
    rows = [{"prompt": "p" * 90, "completion": "c" * 30}] * 60
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source="examples", path=str(path), seq_len=16)
    return dataclasses.replace(vary(train=train), objective=SFT, data=data)


def test_the_pre_flight_compares_a_batch_that_has_a_completion(tmp_path: Path, cache: Path) -> None:
    for seed in range(6):
        made = dataclasses.replace(of_long_prompts(tmp_path, batch_size=2), seed=seed)
        loss, norm = probes.accumulation_differences(made, cache, CPU)
        assert loss <= 1e-6 and norm <= 1e-5


def test_a_step_without_a_target_makes_no_update_and_is_null(make: Make, tmp_path: Path, cache: Path) -> None:
    """Prompts much longer than a sequence: whole batches of one sequence have no completion in them."""
    made = of_long_prompts(tmp_path, batch_size=1, steps=30)
    folder = make(made)
    assert run([folder], cache) == ["done"]
    trained = records(folder)[0]
    batches = open_batches(made, cache)
    empty = [not (batches.batch(step)[:, 1:] >= 0).any() for step in range(30)]
    assert 0 < sum(empty) < 30
    for name in ("loss", "grad_norm"):
        assert trained.is_null(name).tolist() == empty
    assert trained["skip"].tolist() == ["no_targets" if e else None for e in empty]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_a_compiled_step_takes_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batch = config(SHAPE, micro=4), torch.from_numpy(windows())[None]
    model = families.build(made.model, V, T, seed=1)
    eager, fast = (Stepper([made], [model], CPU, compile_loss=compiled) for compiled in (False, True))
    monkeypatch.setattr(fast.stack, "run", None)  # what an eager micro-batch would call
    for _ in range(2):
        a, b = (stepper.step(batch, [1e-3], torch.ones(1), masked=True) for stepper in (eager, fast))
        assert b.tolist()[0] == pytest.approx(a.tolist()[0], rel=1e-5, abs=1e-6)


# --- from the command line


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_study_of_chat_rows_ends_in_a_report(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "cache"))
    chats = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!" * (1 + i % 4)}]
        for i in range(300)
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": chat} for chat in chats]))
    words = f"objective=sft data=sft data.path=rows.json data.layout={layout} data.seq_len=48 model.depth=1 seeds=1"
    words += " train.steps=70 train.batch_size=4 train.eval_sequences=4 optim.lr=3e-3,1e-2 launcher=local study=chats"
    assert sweep.main(words.split()) == 0
    assert "examples are cut" not in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "results/chats/trials.parquet")
    assert table["objective.kind"].tolist() == ["sft"] * 2 and table["data.layout"].tolist() == [layout] * 2
    assert (table["loss_over_unigram"] < 0).all() and table["verdict"].notna().all()
    assert "objective.kind" in (tmp_path / "results/chats/report/index.html").read_text()


@pytest.mark.shareddata
@each_layout
def test_the_300_real_rows_are_trained_on(made: TrialConfig, shared_data: Path, make: Make, cache: Path) -> None:
    data = DataConfig(source="examples", path=str(shared_data / "kto_en_demo.json"), seq_len=256)
    data = dataclasses.replace(data, layout=made.data.layout, validation_share=0.2)
    folder = make(dataclasses.replace(made, data=data))
    assert run([folder], cache) == ["done"]
    state = folder.read_state()
    assert state.init_loss is not None and state.final_loss is not None and state.final_loss < state.init_loss
    assert records(folder)[0]["skip"].tolist() == [None] * 12
