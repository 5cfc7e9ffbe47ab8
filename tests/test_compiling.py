"""train.compile: what decides, what a missing compiler does, and that compiled training is the same training."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import whole
from lone import AMONG, Lone
from test_kto import LABELS, T, V, examples
from test_kto_trial import config as kto_config
from test_kto_trial import windows_of

from stabstudy import config as cfg
from stabstudy import store, trace
from stabstudy.config import (
    COMPILE_FROM,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SyntheticConfig,
    TrainConfig,
    TrialConfig,
)
from stabstudy.data import sources
from stabstudy.planning import compute, preview
from stabstudy.planning.plan import make_plan
from stabstudy.settings import ConfigError
from stabstudy.stability.rules import Rules
from stabstudy.state import Attempt, State
from stabstudy.training import families
from stabstudy.training.objective import IGNORE
from stabstudy.training.pack import run_pack
from stabstudy.training.stack import Stack
from stabstudy.training.step import Stepper, compiled
from stabstudy.training.trial import Engine, Trial

SMALL = TrialConfig(
    model=ModelConfig(depth=2, dim=16, n_heads=2, qk_norm=True),
    optim=OptimConfig(warmup_steps=3),
    data=DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=40_000), seq_len=16),
    train=TrainConfig(steps=8, batch_size=4, checkpoint_every=3, probe_every=3, eval_every=4, eval_sequences=6),
)


def said(word: str, steps: int) -> TrialConfig:
    return dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, compile=word, steps=steps))


@pytest.mark.parametrize(
    ("word", "steps", "compiled"),
    [("off", 10**6, False), ("on", 1, True), ("auto", COMPILE_FROM - 1, False), ("auto", COMPILE_FROM, True)],
)
def test_auto_looks_at_the_planned_steps_only(word: str, steps: int, compiled: bool) -> None:
    config = said(word, steps)
    assert config.compiled == compiled
    wider = dataclasses.replace(config, model=ModelConfig(dim=512), seed=9, optim=OptimConfig(lr=1e-4))
    assert wider.compiled == compiled


@pytest.mark.parametrize(("yaml", "word"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_yamls_booleans_are_on_and_off(yaml: object, word: str) -> None:
    assert cfg.from_dict({"train": {"compile": yaml}}).train.compile == word


def test_no_other_word_and_no_other_boolean() -> None:
    with pytest.raises(ConfigError, match="one of off, on, auto, got 'yes'"):
        cfg.from_dict({"train": {"compile": "yes"}})
    with pytest.raises(ConfigError, match="train.precision"):
        cfg.from_dict({"train": {"precision": True}})


PLANNED = ["sweep=quickstart", "data=synthetic", "study=s", "seeds=1", "launcher=local"]


def test_on_without_a_compiler_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_plan([*PLANNED, "train.compile=on"], tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(compute.NotReadyError, match="train.compile=on: there is no C\\+\\+ compiler no-such-compiler"):
        preview.check_machine(made)
    preview.check_machine(make_plan([*PLANNED, "train.compile=off"], tmp_path))
    assert os.listdir(tmp_path) == []


def test_auto_without_a_compiler_trains_eager_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = [*PLANNED, "train.compile=auto", f"train.steps={COMPILE_FROM}"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    made = make_plan(long, tmp_path)
    assert any("every trial of this launch trains uncompiled" in w for w in made.warnings)
    assert not any("compile" in w for w in make_plan(long[:-1], tmp_path).warnings)
    preview.check_machine(made)


def test_a_missing_python_header_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")  # some program that exists
    monkeypatch.setattr(compute.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python.h" in str(compute.why_not_compile())
    (tmp_path / "Python.h").touch()
    assert compute.why_not_compile() is None


def test_auto_refuses_to_mix_engines(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.compile, train.steps: auto compiles from"):
        make_plan([*PLANNED, "train.compile=auto", f"train.steps=100,{COMPILE_FROM}"], tmp_path)


def test_the_first_attempt_decides_for_all(tmp_path: Path) -> None:
    def compiles(config: TrialConfig, engine: Engine, *choices: bool) -> bool:
        """Of the attempt after those, whose own entry is there already."""
        attempts = tuple(Attempt("h", 1, "t", engine={"compiled": c}) for c in choices)
        folder = store.StudyFolder(tmp_path / "study").trial("t")
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_state(State("t", attempts=(*attempts, Attempt("h", 2, "t"))))
        member = Trial(folder, engine, Rules())
        member.config = config
        return member.compiles()

    long, here, without = said("auto", COMPILE_FROM), Engine(Path()), Engine(Path(), compiler=False)
    assert compiles(long, here) and not compiles(long, without)
    assert compiles(long, without, True) and not compiles(long, here, False)
    assert not compiles(said("auto", 10), here)


# compiled training (a C++ compiler runs: tens of seconds)

needs_compiler = pytest.mark.skipif(compute.why_not_compile() is not None, reason="no C++ compiler")
quiet = pytest.mark.filterwarnings("default")  # the compiler's own warnings are not ours to mend


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder of kernels for all tests here, and an error where something would be compiled a second time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "kernels"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.reset()


def stepper(config: TrialConfig, is_compiled: bool, neighbours: int = 0) -> Lone:
    model: Any = families.build(config.model, 61, 16, 0)
    return Lone(config, model, neighbours, is_compiled)


@pytest.mark.slow
@needs_compiler
@quiet
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
@pytest.mark.parametrize(
    ("precision", "z_loss"), [whole("fp32", 0.0), ("fp32", 1e-4), whole("bf16", 1e-4), ("bf16_stream", 1e-4)]
)
def test_compiled_agrees_with_eager(precision: str, z_loss: float, neighbours: int) -> None:
    """A member alone, and one whose model runs for three under vmap inside the compiler."""
    train = dataclasses.replace(SMALL.train, micro_batch_size=2, precision=precision, z_loss=z_loss)
    config = dataclasses.replace(SMALL, train=train)
    one, other = stepper(config, True, neighbours), stepper(config, False, neighbours)
    far = 1e-5 if precision == "fp32" else 2e-2  # bf16: 8 bits, rounded at other places
    generator = np.random.default_rng(0)
    for _ in range(6):
        windows = generator.integers(0, 61, (4, 17))
        a, b = one.step(windows, 3e-3), other.step(windows, 3e-3)
        for column in ("loss", "grad_norm", "logit_absmax", "logz_mean"):
            assert a[column] == pytest.approx(b[column], rel=far)


@pytest.mark.slow
@needs_compiler
@quiet
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("count", [whole(1), 2])
def test_compiled_kto_agrees_with_eager(count: int) -> None:
    """With the frozen reference inside what is compiled."""
    config = dataclasses.replace(kto_config(), train=dataclasses.replace(kto_config().train, steps=4))
    models = [families.build(config.model, V, T, 0) for _ in range(count)]
    both = [Stepper([config] * count, copy.deepcopy(models), torch.device("cpu"), fast) for fast in (True, False)]
    windows = torch.from_numpy(windows_of(examples(1, 5), LABELS)).expand(count, -1, -1)
    for _ in range(4):
        a, b = (made.step(windows, [1e-2] * count, torch.ones(count), masked=True) for made in both)
        for name in ("loss", "grad_norm", "kl_raw", "reward_chosen", "logit_sd_rejected", "sequences_chosen"):
            column = both[0].columns.index(name)
            assert a[:, column].tolist() == pytest.approx(b[:, column].tolist(), rel=1e-4, abs=1e-5), name
    assert abs(float(b[0, both[0].columns.index("reward_chosen")])) > 0.01


@pytest.mark.slow
@needs_compiler
@quiet
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("count", [whole(1), 2])
def test_the_compiled_stack_is_the_stack(count: int) -> None:
    """Logits and gradients of every weight, K = 1 and K = 2."""
    models: list[Any] = [families.build(SMALL.model, 61, 16, seed) for seed in range(count)]
    stack = Stack(models, count, "fp32", torch.device("cpu"))
    tokens = torch.randint(61, (count, 3, 16), generator=torch.Generator().manual_seed(0))

    def function(model: Any, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = model(tokens_BT).float()
        return {"logits": logits, "sum": logits.square().mean()}

    def of(leaves: list[torch.Tensor], tokens_KBT: torch.Tensor) -> dict[str, torch.Tensor]:
        return stack.call(function, leaves, tokens_KBT)

    eager, fast = of(stack.leaves, tokens), compiled(of)(stack.leaves, tokens)
    assert fast["logits"].shape == (count, 3, 16, 61)
    assert (fast["logits"] - eager["logits"]).abs().max() <= 1e-5 * eager["logits"].abs().max()
    for a, b in zip(stack.gradients(fast["sum"].sum()), stack.gradients(eager["sum"].sum()), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.slow
@needs_compiler
@quiet
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("neighbours", AMONG.values(), ids=AMONG)
def test_one_pack_compiles_once(monkeypatch: pytest.MonkeyPatch, neighbours: int) -> None:
    """Evaluation batches whose last part is smaller, and padded ones, go past the compiler."""
    count = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal count
        count += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: torch._dynamo.optimize(counting, dynamic=dynamic)(f))
    config = dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, micro_batch_size=2))
    made = stepper(config, True, neighbours)
    windows = np.random.default_rng(0).integers(0, 61, (5, 17))
    for step in range(3):
        made.step(windows[:4], 1e-3 / (step + 1))
        made.loss_on(windows)
    padded = windows[:4].copy()
    padded[0, 9:] = IGNORE
    made.step(padded, 1e-3)
    made.step(windows[:4], 1e-3)
    assert count == 1
    other = torch.zeros((made.stepper.K, 3, 16), dtype=torch.long)
    made.stepper._terms((other, other), False)
    assert count == 2  # the count can rise


@quiet
def test_one_compilation_too_many_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the compiler would run the function eagerly from there on, without a word."""
    runs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        runs.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: torch._dynamo.optimize(counting, dynamic=dynamic)(f))

    def doubled(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    limit = torch._dynamo.config.recompile_limit
    fast = compiled(doubled)
    for length in range(2, limit + 2):
        fast(torch.zeros(length))
    assert len(runs) == limit
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        fast(torch.zeros(limit + 2))
    fast = compiled(doubled)  # a pack of another shape begins anew
    assert fast(torch.ones(limit + 2)).tolist() == [2.0] * (limit + 2) and len(runs) == limit + 1
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", False)
    for length in range(2, limit + 10):  # negative control: without the setting it goes on in silence
        fast(torch.zeros(length))
    assert len(runs) == 2 * limit


@pytest.mark.slow
@needs_compiler
@quiet
@pytest.mark.usefixtures("compiler")
def test_compiled_trial_repeats_and_resumes_bitwise(tmp_path: Path, cache: Path) -> None:
    config = said("on", 8)

    def trained(name: str, *stops: int) -> trace.Rows:
        fingerprint = sources.fingerprint(config.data)
        folder = store.StudyFolder(tmp_path / name).trial(cfg.trial_id(config, fingerprint))
        folder.path.mkdir(parents=True)
        body = {"trial_id": folder.trial_id, "config": cfg.to_dict(config), "data_fingerprint": fingerprint}
        store.write_json(folder.config_file, body)
        for stop in stops:
            torch.compiler.reset()  # a new process has nothing compiled, but the kernels on disk
            (state,) = run_pack([folder], Engine(cache), Rules(), lambda progress, s=stop: progress[0].step == s)
            assert state.status == "interrupted"
        torch.compiler.reset()
        (state,) = run_pack([folder], Engine(cache), Rules(), lambda progress: False)
        assert state.status == "done" and all(a.engine["compiled"] for a in state.attempts)
        rows = folder.rows(trace.TRACE)
        assert rows is not None
        return rows

    whole = trained("whole")
    for other in (trained("again"), trained("stopped", 3, 5)):
        for name in ("loss", "grad_norm", "layer_grad_norm", "logit_absmax", "logz_mean"):
            assert np.array_equal(whole[name], other[name]), name
