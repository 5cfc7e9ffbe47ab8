"""What a launch warns of before it starts: each at its threshold, and nothing where nothing is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stabstudy import config as cfg
from stabstudy import sweep
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.data import sources
from stabstudy.data.batches import Supply, open_batches
from stabstudy.data.tokens import prepare
from stabstudy.planning import estimate
from stabstudy.planning.compute import Compute
from stabstudy.planning.plan import make_plan
from stabstudy.sweeping.launch import prepare_data

PLENTY = Supply(10**9, exact=True)


def config(**groups: Any) -> TrialConfig:
    return cfg.from_dict(groups)


def lines_of(
    *configs: TrialConfig, axes: tuple[str, ...] = (), supplies: dict[DataConfig, Supply | None] | None = None
) -> list[str]:
    known = dict.fromkeys((c.data for c in configs), PLENTY) if supplies is None else supplies
    return list(estimate.caveats(configs, axes, known))


def test_the_defaults_have_none() -> None:
    assert lines_of(TrialConfig()) == []


# too short for a verdict


@pytest.mark.parametrize(("steps", "judged"), [(1, False), (61, False), (62, True), (10_000, True)])
def test_a_verdict_needs_fifty_steps_after_the_first_twelve(steps: int, judged: bool) -> None:
    lines = lines_of(config(train={"steps": steps, "eval_every": 1}, optim={"warmup_steps": 0}))
    assert (
        lines == []
        if judged
        else lines
        == [
            "train.steps: 1 of 1 trial will get no verdict: it needs 50 evaluable steps after the first 12, so "
            "train.steps must be at least 62"
        ]
    )


def test_short_trials_are_counted() -> None:
    steps = (30, 60, 62, 200)
    lines = lines_of(*(config(train={"steps": s, "eval_every": 1}, optim={"warmup_steps": 0}) for s in steps))
    assert len(lines) == 1 and lines[0].startswith("train.steps: 2 of 4 trials will get no verdict")


# evaluations that never come


@pytest.mark.parametrize(("every", "lines"), [(100, 0), (101, 1)])
def test_an_evaluation_beyond_the_end(every: int, lines: int) -> None:
    found = lines_of(config(train={"steps": 100, "eval_every": every}))
    assert len(found) == lines
    assert not found or found[0] == (
        "train.eval_every: 101 is beyond train.steps=100 in 1 of 1 trial: no validation loss between the first and the "
        "last"
    )


# steps of few tokens


@pytest.mark.parametrize(("batch", "length", "lines"), [(8, 16, 0), (127, 1, 1), (4, 16, 1), (1, 128, 0)])
def test_few_tokens_a_step(batch: int, length: int, lines: int) -> None:
    found = lines_of(config(train={"batch_size": batch}, data={"seq_len": length}), TrialConfig())
    assert len(found) == lines
    assert not found or found[0] == (
        f"train.batch_size, data.seq_len: {batch * length} tokens a step in 1 of 2 trials: under 128 a rough gradient "
        "norm may be sampling noise"
    )


# epochs

ONE = config(train={"steps": 100, "batch_size": 10}, data={"seq_len": 50})  # 50,000 tokens


@pytest.mark.parametrize(
    ("supply", "line"),
    [
        (None, None),
        (Supply(50_000, exact=True), None),
        (Supply(50_000, exact=False), None),
        (Supply(25_000, exact=True), "data: a trial trains 2 epochs of pysrc: repeated text changes losses and spikes"),
        (
            Supply(40_000, exact=False),
            "data: a trial trains at least 1.25 epochs of pysrc: repeated text changes losses and spikes",
        ),
        (Supply(0, exact=True), None),
    ],
)
def test_text_that_repeats(supply: Supply | None, line: str | None) -> None:
    assert lines_of(ONE, supplies={ONE.data: supply}) == ([] if line is None else [line])


def other(**data: Any) -> TrialConfig:
    return config(train={"steps": 100, "batch_size": 10}, data={"seq_len": 50, **data})


C4 = other(source="text", path="c4.txt")


@pytest.mark.parametrize(
    ("here", "there", "line"),
    [
        (PLENTY, PLENTY, None),
        (Supply(100_000, True), PLENTY, None),  # neither repeats
        (Supply(10_000, True), Supply(10_500, True), None),  # both, about as much
        (Supply(10_000, True), Supply(100_000, True), "5 epochs of pysrc, 0.5 epochs of c4.txt"),
        (Supply(10_000, False), Supply(100_000, True), "at least 5 epochs of pysrc, 0.5 epochs of c4.txt"),
        (Supply(10_000, True), None, "5 epochs of pysrc, an unknown number of c4.txt"),
        (None, Supply(100_000, True), None),
        (None, None, None),
    ],
)
def test_texts_that_repeat_unequally(here: Supply | None, there: Supply | None, line: str | None) -> None:
    for axes in (("data",), ("optim.lr", "data.path")):
        found = [t for t in lines_of(ONE, C4, axes=axes, supplies={ONE.data: here, C4.data: there}) if "axis" in t]
        assert found == ([] if line is None else [f"data: {line}: the axis compares repetition as well as text"])
    assert not [
        t for t in lines_of(ONE, C4, axes=("optim.lr",), supplies={ONE.data: here, C4.data: there}) if "axis" in t
    ]


def test_parts_of_one_text_are_texts_of_their_own() -> None:
    small, large = other(max_bytes=10_000), other(max_bytes=10**6)
    lines = lines_of(
        small, large, axes=("data.max_bytes",), supplies={small.data: Supply(10_000, True), large.data: PLENTY}
    )
    assert lines[-1].startswith("data: 5 epochs of pysrc (10 kB), 5e-05 epochs of pysrc (1 MB): the axis compares")


# decay


def decays(mode: str, lr: float = 1e-2, wd: float = 0.02, **more: Any) -> TrialConfig:
    return config(optim={"decay_mode": mode, "lr": lr, "weight_decay": wd}, **more)


def test_decay_modes_at_one_strength_setting_are_mixed_with_strength() -> None:
    assert lines_of(decays("coupled"), decays("independent")) == [
        "optim.decay_mode: at one weight_decay, independent decay is 100 times (1/lr) as strong as coupled; "
        "equally strong is lr times the coupled weight_decay, here 0.01 * 0.02 = 0.0002"
    ]
    lines = lines_of(*(decays(m, lr) for m in ("coupled", "independent") for lr in (1e-1, 1e-3)))
    assert "independent decay is 10 to 1,000 times (1/lr)" in lines[0]


def test_decay_modes_of_equal_strength_are_not() -> None:
    assert lines_of(decays("coupled", wd=0.1), decays("independent", wd=0.001)) == []
    assert lines_of(decays("independent"), decays("independent", lr=1e-3)) == []
    assert lines_of(decays("coupled", wd=0), decays("independent", wd=0)) == [], "no decay, no mode"
    assert lines_of(decays("coupled"), decays("independent", model={"depth": 2})) == [], (
        "they differ in more than the mode"
    )


def test_timescales_by_hand() -> None:
    rule = {"lr_rule": "sqrt_batch", "base_batch": 2}
    ruled = config(optim={"lr": 1e-2, "weight_decay": 0.1, **rule}, train={"batch_size": 8, "steps": 100})
    assert estimate.timescales([ruled]) == ("weight decay timescale 1/(lr*weight_decay): 500 steps, 5 times the run"), (
        "twice the rate at four times the batch"
    )
    both = [decays("coupled", 1e-2, 0.1), decays("coupled", 1e-3, 0.1), decays("coupled", 1e-3, wd=0)]
    assert estimate.timescales(both) == (
        "weight decay timescale 1/(lr*weight_decay): 1,000 to 10,000 steps, 5 to 50 times the run"
    )
    assert estimate.timescales([decays("independent", 1e-3)]) == (
        "weight decay timescale 1/weight_decay: 50 steps, 0.25 times the run"
    )
    assert estimate.timescales([decays("independent"), decays("coupled", wd=0.1)]) == (
        "weight decay timescale 1/(lr*weight_decay), 1/weight_decay: 50 to 1,000 steps, 0.25 to 5 times the run"
    )
    assert estimate.timescales([decays("coupled", wd=0)]) is None


# in a launch


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], str]:
    """Writes a JSON lines file of so many lines of 100 bytes of text; its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "cache"))

    def write(name: str, lines: int) -> str:
        path = tmp_path / name
        path.write_text((json.dumps({"text": "word " * 20, "url": "x" * 80}) + "\n") * lines)
        return str(path)

    return write


WORDS = ["model.depth=1", "model.dim=16", "train.steps=62", "train.eval_every=31", "train.eval_sequences=4", "seeds=2",
         "data=jsonl", "data.seq_len=32", "launcher=local", "study=s"]  # fmt: skip


def test_a_bound_before_tokenizing_and_exact_after(
    corpus: Callable[[str, int], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """62 steps of 256 tokens, 50 documents of 102 tokens: 3.5 epochs; of a file twice as large as its text."""
    words = [*WORDS, f"data.path={corpus('small.jsonl', 50)}"]
    assert sweep.main([*words, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: data: a trial trains at least 1.73 epochs") and err.count("\n") == 1
    assert "times the run" in out.splitlines()[-1] and not (tmp_path / "cache").exists()
    plan = make_plan(words, tmp_path)
    lines: list[str] = []
    prepare_data(plan, tmp_path / "cache", lines.append)
    b = open_batches(plan.trials[0].config, tmp_path / "cache")
    epochs = f"{62 * 256 / b.training_tokens:.3g}"
    exact = f"data: a trial trains {epochs} epochs of {tmp_path}/small.jsonl: repeated text changes losses and spikes"
    assert lines[-1] == f"warning: {exact}"
    assert lines[-2] == (
        f"data: {b.training_tokens:,} tokens to train on, unigram entropy {b.unigram_entropy:.3f} nat/token"
    )
    assert make_plan(words, tmp_path).warnings == (exact,), "now the plan knows it, and the launch says it once"
    lines.clear()
    prepare_data(make_plan(words, tmp_path), tmp_path / "cache", lines.append)
    assert len(lines) == 1


def test_a_data_axis_over_unequal_files(corpus: Callable[[str, int], str], tmp_path: Path) -> None:
    paths = [corpus("small.jsonl", 50), corpus("large.jsonl", 5000)]
    words = [*WORDS, f"data.path={','.join(paths)}", f"compute.cache_dir={tmp_path}/own"]
    assert any("the axis compares repetition" in w for w in make_plan(words, tmp_path).warnings)
    for trial in make_plan(words, tmp_path).trials:
        prepare(trial.config.data, tmp_path / "own")
    (first, second) = make_plan(words, tmp_path).warnings
    assert "at least" not in first + second and f"of {paths[0]}, 0.0" in second


def test_everything_at_once_stops_nothing(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train.steps=30", "data.seq_len=8", "optim.decay_mode=coupled,independent"]
    words += ["optim.weight_decay=0.01", "--dry-run"]
    assert sweep.main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == [
        "train.steps", "train.eval_every", "train.batch_size, data.seq_len", "optim.decay_mode"
    ]  # fmt: skip
    assert all(line.startswith("warning: ") for line in lines)


def test_the_supply_is_looked_up_where_the_launch_tokenizes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "cache"))
    data = ["data=synthetic", "data.synthetic.bytes=20000", "seeds=1"]
    (before,) = make_plan(data, tmp_path).warnings
    trial = make_plan(data, tmp_path).trials[0]
    assert "at least" in before and sources.fingerprint(trial.config.data) == trial.data_fingerprint
    prepare(trial.config.data, tmp_path / "cache")
    (after,) = make_plan(data, tmp_path).warnings
    assert "at least" not in after
    assert make_plan([*data, f"compute.cache_dir={tmp_path}/other"], tmp_path).warnings == (before,)
    assert Compute().cache_dir is None
