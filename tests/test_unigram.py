"""The unigram entropy of the training part: right, counted once, and an old cache is upgraded by counting alone."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from stabstudy import config as cfg
from stabstudy import store
from stabstudy.config import DataConfig, SyntheticConfig
from stabstudy.data import batches, sources, tokens
from stabstudy.data.batches import Batches, open_batches
from stabstudy.data.tokens import Corpus, prepare
from stabstudy.settings import DataError
from stabstudy.stability.rules import Rules
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine


def corpus(ids: Any, folder: Path, vocab: int = 50) -> Corpus:
    array = np.asarray(ids, np.uint16)
    return Corpus(array, np.array([len(array)], np.uint64), vocab, "f" * 16, folder)


def targets(b: Batches) -> list[int]:
    """Every target of one epoch, as the trainer gets them."""
    assert b.batch_size == 1
    return [int(t) for step in range(b.training_windows) for t in b.batch(step)[0, 1:]]


@pytest.fixture
def text(tmp_path: Path) -> Corpus:
    return prepare(DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=60_000)), tmp_path)


def test_it_is_the_entropy_of_what_is_trained_on(text: Corpus) -> None:
    b = Batches(text, 16, 1, 3, 0.2, 4)
    seen = targets(b)
    assert b.training_tokens == len(seen)
    assert b.unigram_entropy == pytest.approx(entropy(list(Counter(seen).values())), rel=1e-12)
    whole = entropy(np.bincount(text.tokens))
    assert b.unigram_entropy != pytest.approx(whole, rel=1e-6), "the validation part is not in it"


@given(
    ids=st.lists(st.integers(0, 49), min_size=30, max_size=400),
    seq_len=st.integers(1, 9),
    share=st.floats(0.02, 0.8),
)
def test_any_training_part(
    ids: list[int], seq_len: int, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        b = Batches(corpus(ids, tmp_path_factory.mktemp("corpus")), seq_len, 1, 0, share, 1)
    except DataError:
        return  # too small for one batch
    seen = targets(b)
    assert b.training_tokens == len(seen)
    assert b.unigram_entropy == pytest.approx(entropy(list(Counter(seen).values())), rel=1e-12, abs=1e-12)


def test_by_hand(tmp_path: Path) -> None:
    spans = [(0, 4), (6, 8)]  # four of one token, then one of each of two: 4/6, 1/6, 1/6
    ids = [7, 7, 7, 7, 1, 1, 8, 9]
    by_hand = -(2 / 3) * math.log(2 / 3) - 2 * (1 / 6) * math.log(1 / 6)
    assert batches.measure_entropy(corpus(ids, tmp_path), spans) == pytest.approx(by_hand, rel=1e-14)
    assert batches.measure_entropy(corpus([3] * 8, tmp_path), spans) == 0
    assert batches.measure_entropy(corpus([0, 1] * 4, tmp_path), [(0, 8)]) == pytest.approx(math.log(2), rel=1e-14)


def test_chunks_change_nothing(text: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [(1, 20_001), (30_000, 59_999)]
    whole = batches.measure_entropy(text, spans)
    monkeypatch.setattr(batches, "CHUNK", 777)
    assert batches.measure_entropy(text, spans) == whole


def test_memory_is_flat(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    with path.open("wb") as f:
        f.truncate(1 << 27)  # 64 million tokens: as int64 they would take half a GB
    mapped = np.memmap(path, "<u2", mode="r").view(np.ndarray)
    big = Corpus(mapped, np.array([len(mapped)], np.uint64), 60_000, "f" * 16, tmp_path)
    tracemalloc.start()
    assert batches.measure_entropy(big, [(0, len(mapped))]) == 0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24e6


# counted once


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every count of the tokens."""
    made: list[int] = []
    real = batches.measure_entropy

    def counting(corpus: Corpus, spans: Any) -> float:
        made.append(len(spans))
        time.sleep(0.02)  # long enough for the others to arrive
        return real(corpus, spans)

    monkeypatch.setattr(batches, "measure_entropy", counting)
    return made


def test_an_old_cache_is_upgraded_without_its_text(text: Corpus, counts: list[int], monkeypatch: Any) -> None:
    """A cache of an older version is one that holds no unigram file."""
    before = {p.name: p.stat().st_mtime_ns for p in text.folder.iterdir()}
    assert sorted(before) == ["docs.bin", "meta.json", "tokens.bin"]
    monkeypatch.setattr(tokens, "build_cache", lambda *a: pytest.fail("tokenized again"))
    first = Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy
    again = prepare(DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=60_000)), text.folder.parent.parent)
    assert Batches(again, 16, 2, 5, 0.2, 8).unigram_entropy == first, "seed, batch and evaluation do not matter"
    assert len(counts) == 1
    assert {p.name: p.stat().st_mtime_ns for p in text.folder.iterdir()} | before == {
        **before,
        "unigram-16-0.2.json": (text.folder / "unigram-16-0.2.json").stat().st_mtime_ns,
    }


def test_each_cut_of_the_corpus_has_its_own(text: Corpus, counts: list[int]) -> None:
    values = {Batches(text, t, 1, 0, share, 1).unigram_entropy for t in (16, 32) for share in (0.05, 0.3)}
    assert len(values) == 4 and len(counts) == 4
    assert len(list(text.folder.glob("unigram-*.json"))) == 4


def test_of_many_at_once_one_counts(text: Corpus, counts: list[int]) -> None:
    values: list[float] = []
    workers = [
        threading.Thread(target=lambda: values.append(Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(values) == 4 and len(set(values)) == 1 and len(counts) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[1]",
        '{"unigram_entropy": 1.0}',
        '{"unigram_entropy": 1.0, "targets": 3}',
        "NaN",
        "-0.5",
        "99.0",
        '"1"',
    ],
)
def test_a_damaged_file_is_counted_again(text: Corpus, counts: list[int], damage: str) -> None:
    b = Batches(text, 16, 4, 0, 0.2, 4)
    right = b.unigram_entropy
    path = text.folder / "unigram-16-0.2.json"
    whole = (
        damage if damage[:1] in ("", "{", "[") else f'{{"unigram_entropy": {damage}, "targets": {b.training_tokens}}}'
    )
    path.write_text(whole)
    assert Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy == right and len(counts) == 2
    assert json.loads(path.read_text()) == {"unigram_entropy": right, "targets": b.training_tokens}


def test_a_cache_that_cannot_be_written_serves_all_the_same(text: Corpus, monkeypatch: Any) -> None:
    right = Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy
    (text.folder / "unigram-16-0.2.json").unlink()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store, "write_json", read_only)
    assert Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy == right
    monkeypatch.setattr(tokens, "lock", read_only)
    assert Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy == right
    assert not list(text.folder.glob("unigram*"))


def test_a_rebuilt_cache_forgets_it(text: Corpus, monkeypatch: Any) -> None:
    config = DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=60_000))
    assert Batches(text, 16, 4, 0, 0.2, 4).unigram_entropy
    (text.folder / "meta.json").write_text("{")
    monkeypatch.setattr(tokens, "_verified", set())
    again = prepare(dataclasses.replace(config), text.folder.parent.parent)
    assert again.folder == text.folder and not list(text.folder.glob("unigram*"))


# in the state of a trial

TRIAL = cfg.TrialConfig(
    model=cfg.ModelConfig(depth=1, dim=16, n_heads=2),
    optim=cfg.OptimConfig(warmup_steps=3),
    data=DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=40_000), seq_len=16),
    train=cfg.TrainConfig(steps=12, batch_size=4, checkpoint_every=4, eval_sequences=6),
)


def begun(folder: Path) -> store.TrialFolder:
    """The trial's folder, as a launch leaves it."""
    fingerprint = sources.fingerprint(TRIAL.data)
    trial = store.StudyFolder(folder / "study").trial(cfg.trial_id(TRIAL, fingerprint))
    trial.path.mkdir(parents=True)
    body = {"trial_id": trial.trial_id, "config": cfg.to_dict(TRIAL), "data_fingerprint": fingerprint}
    store.write_json(trial.config_file, body)
    return trial


def test_a_trial_knows_what_its_loss_must_fall_below(tmp_path: Path) -> None:
    trial = begun(tmp_path)
    (state,) = run_pack([trial], Engine(tmp_path / "cache"), Rules(), lambda progress: False)
    b = open_batches(
        dataclasses.replace(TRIAL, train=dataclasses.replace(TRIAL.train, batch_size=1)), tmp_path / "cache"
    )
    seen = targets(b)
    assert state.status == "done" and state.train_tokens == len(seen)
    assert state.unigram_entropy == pytest.approx(entropy(list(Counter(seen).values())), rel=1e-12)
    assert trial.read_state() == state


def test_a_trial_that_an_older_version_began_learns_it_when_it_goes_on(tmp_path: Path) -> None:
    trial = begun(tmp_path)
    (state,) = run_pack([trial], Engine(tmp_path / "cache"), Rules(), lambda progress: progress[0].step >= 6)
    assert state.status == "interrupted" and state.unigram_entropy is not None
    body = store.read_json(trial.state_file)
    for name in ("unigram_entropy", "train_tokens"):
        del body[name]
    store.write_sealed(trial.state_file, body)
    assert trial.read_state() == dataclasses.replace(state, unigram_entropy=None, train_tokens=None)
    (ended,) = run_pack([trial], Engine(tmp_path / "cache"), Rules(), lambda progress: False)
    assert (ended.unigram_entropy, ended.train_tokens) == (state.unigram_entropy, state.train_tokens)
    assert ended.init_loss == state.init_loss, "measured once"


def test_a_trial_on_other_data_builds_nothing_from_them(tmp_path: Path, monkeypatch: Any) -> None:
    planned = begun(tmp_path)
    config, body = planned.read_own()
    trial_id = cfg.trial_id(config, "0" * 16)
    trial = store.TrialFolder(planned.path.rename(planned.path.with_name(trial_id)))
    store.write_json(trial.config_file, body | {"trial_id": trial_id, "data_fingerprint": "0" * 16})
    (state,) = run_pack([trial], Engine(tmp_path / "cache"), Rules(), lambda progress: False)
    assert state.status == "failed" and state.error is not None
    assert f"must still be what the study began with (fingerprint {'0' * 16}), got " in state.error["message"]
    assert not (tmp_path / "cache").exists()
