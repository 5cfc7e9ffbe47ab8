"""The check before foreign models train: sound ones pass, wrong normalisers and models that mix their batch do not."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stabstudy import sweep
from stabstudy.config import FAMILIES, OF_FAMILY, DataConfig, ModelConfig, SyntheticConfig, TrainConfig, TrialConfig
from stabstudy.planning.compute import Compute, NotReadyError
from stabstudy.settings import ConfigError
from stabstudy.sweeping import preflight
from stabstudy.training import families, objective, probes
from stabstudy.training.objective import IGNORE, MINIMISED

CPU = torch.device("cpu")
DATA = DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=40_000), seq_len=16)
TRAIN = TrainConfig(batch_size=4, eval_sequences=6, precision="bf16")


def config(family: str, **train: Any) -> TrialConfig:
    model = ModelConfig(family=family, depth=2, dim=16, n_heads=2, **OF_FAMILY.get(family, {}))
    return TrialConfig(model=model, data=DATA, train=dataclasses.replace(TRAIN, **train))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def exact(apart: tuple[float, float]) -> bool:
    return apart[0] <= preflight.LOSS_APART and apart[1] <= preflight.NORM_APART


@pytest.mark.parametrize(
    "train", [{}, {"batch_size": 1}, {"batch_size": 32, "z_loss": 1e-2, "micro_batch_size": 8}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact(family: str, train: dict[str, Any], cache: Path) -> None:
    loss, norm = probes.accumulation_differences(config(family, **train), cache, CPU)
    assert loss <= 3e-7 and norm <= 3e-7


def test_what_is_left_of_the_targets_is_very_unequal() -> None:
    windows = probes.unequal(np.ones((8, 17), np.int64))
    assert (windows[:, 1:] != IGNORE).sum(axis=1).tolist() == [2, 4, 6, 8, 10, 12, 14, 16]
    assert (windows[:, 0] == 1).all()
    short = probes.unequal(np.ones((8, 3), np.int64))
    assert (short[:, 1:] != IGNORE).sum(axis=1).tolist() == [1, 1, 1, 1, 1, 1, 1, 2]


def wrong_by(monkeypatch: pytest.MonkeyPatch, factor: Callable[[Tensor], float]) -> None:
    """From here on loss and what is minimised are multiplied by a factor of the micro-batch's targets."""
    sums = objective.target_sums

    def wrong(logits: Tensor, targets: Tensor, *rest: Any) -> dict[str, Tensor]:
        right = sums(logits, targets, *rest)
        return right | {name: right[name] * factor(targets) for name in (MINIMISED, "loss")}

    monkeypatch.setattr(objective, "target_sums", wrong)


def test_a_mean_of_means_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is nearly right; its norm is not."""
    total = sum(16 * (row + 1) // 4 for row in range(4))
    wrong_by(monkeypatch, lambda targets: total / int((targets != IGNORE).sum()) * len(targets) / 4)
    loss, norm = probes.accumulation_differences(config("llama"), cache, CPU)
    assert loss < 0.05 and norm > 0.05


def test_no_division_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_by(monkeypatch, lambda targets: 4 / len(targets))
    assert probes.accumulation_differences(config("llama"), cache, CPU) == pytest.approx((3, 3), rel=1e-3)


def test_a_model_whose_sequences_see_each_other_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = families.HfDecoder.forward

    def mixed(model: families.HfDecoder, tokens: Tensor) -> Tensor:
        logits = forward(model, tokens)
        return logits + 1e-2 * logits.mean(0)

    monkeypatch.setattr(families.HfDecoder, "forward", mixed)
    assert not exact(probes.accumulation_differences(config("qwen3"), cache, CPU))


def test_weights_that_are_not_finite_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "initial_matrix", lambda config, seed, name, part, shape: torch.full(shape, math.nan))
    assert not exact(probes.accumulation_differences(config("gemma3"), cache, CPU))


# who asks


def test_each_distinct_foreign_model_is_asked_about_once_with_the_smallest_batch() -> None:
    small, large = config("llama", batch_size=2), config("llama", batch_size=64)
    deeper = dataclasses.replace(large, model=dataclasses.replace(large.model, depth=3))
    given = [large, config("lingua"), dataclasses.replace(small, seed=1), config("gemma3"), deeper, small]
    assert preflight.foreign_models(given) == [given[2], config("gemma3"), deeper]
    preflight.check_models([config("lingua")], Compute(), Path("nowhere"), pytest.fail)  # nothing to ask


def answer(monkeypatch: pytest.MonkeyPatch, *apart: tuple[float, float]) -> list[str]:
    monkeypatch.setattr(preflight, "_measured", lambda configs, compute, cache_dir: list(apart))
    return []


def test_all_that_are_not_exact_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    said = answer(monkeypatch, (1e-7, 2e-7), (1.5e-3, 0.74), (math.nan, math.nan))
    with pytest.raises(ConfigError) as caught:
        preflight.check_models([config(f) for f in OF_FAMILY], Compute(), Path("nowhere"), said.append)
    rule, most = "16x2 is not exact under gradient accumulation", "(at most 1e-05 and 0.0001 are rounding)"
    apart = "one batch whole and split, loss differs by"
    assert [str(p) for p in caught.value.problems] == [
        f"model.family: qwen3 {rule}: {apart} 1.5e-03, gradient norm by 7.4e-01 {most}",
        f"model.family: gemma3 {rule}: {apart} nan, gradient norm by nan {most}",
    ]
    assert said == [
        "pre-flight: checking gradient accumulation of llama 16x2, qwen3 16x2, gemma3 16x2",
        f"pre-flight: llama 16x2 is exact: {apart} 1.0e-07, gradient norm by 2.0e-07",
    ]


def words(tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 600)
    return [
        "model=qwen3", "model.depth=1", "model.dim=16", "train.steps=12", "train.eval_sequences=8",
        "optim.warmup_steps=2", "data=text", f"data.path={tmp_path}/text.txt", "optim.lr=1e-3", "optim.clip=1.0",
        "seeds=1", "launcher=local", "study=small", f"compute.cache_dir={tmp_path}/cache",
    ]  # fmt: skip


def test_a_mismatch_is_exit_code_2_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answer(monkeypatch, (0.0, 0.5))
    monkeypatch.chdir(tmp_path)
    assert sweep.main(words(tmp_path)) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: conf: model.family: qwen3 16x1 is not exact") and "norm by 5.0e-01" in line
    assert not (tmp_path / "results").exists()


def command(tmp_path: Path, planted: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a Python that runs the planted code first, and so does its child."""
    folder = tmp_path / "planted"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(planted)
    path = os.pathsep.join([str(folder), str(Path(sweep.__file__).parent.parent)])
    return subprocess.run(
        [sys.executable, "-m", "stabstudy.sweep", *words(tmp_path)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_transformers_it_is_the_machine(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(sweep.__file__).parent.parent)]))
    reason = "the pre-flight of model.family could not run: ImportError: none here"
    with pytest.raises(NotReadyError, match=reason):
        preflight.check_models([config("llama")], Compute(), cache, lambda line: None)


SABOTAGE = """
import sys
if sys.argv[0] == "-m":  # the program to be run with -m is not known yet: both, the command and its child
    from stabstudy.training.step import Stepper
    right = Stepper.accumulate
    def wrong(stepper, windows, targets, masked, measure_noise=False):
        return right(stepper, windows, targets * stepper.micro_batch, masked, measure_noise)
    Stepper.accumulate = wrong
"""


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["", SABOTAGE], ids=["sound", "sabotaged"])
def test_through_the_real_command(planted: str, tmp_path: Path) -> None:
    done = command(tmp_path, planted)
    if planted:
        *_, line = done.stderr.splitlines()
        assert done.returncode == 2 and line.startswith("error: conf: model.family: qwen3 16x1 is not"), done.stderr
        assert not (tmp_path / "results").exists()
        return
    assert done.returncode == 0, done.stderr
    first, second, *_ = [line for line in done.stdout.splitlines() if line.startswith("pre-flight: ")]
    assert first == "pre-flight: checking gradient accumulation of qwen3 16x1"
    assert second.startswith("pre-flight: qwen3 16x1 is exact: one batch whole and split, loss differs by ")
    assert len(list((tmp_path / "results" / "small" / "trials").rglob("trace.parquet"))) == 1
