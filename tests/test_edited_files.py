"""Edited files are never believed: whatever is changed in a study's JSON is found, or changes no number.

Every mutation of a file is tried on a study whose right tables are known. What may come out: the trial is named as
damaged, or its row and its spikes are those of the untouched study.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import planted
import pytest

from stabstudy import config as cfg
from stabstudy import store
from stabstudy.analysis.study import Study
from stabstudy.analysis.tables import Tables, read_tables
from stabstudy.config import OptimConfig, TrialConfig
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Source, judge_trial, write_summary
from stabstudy.trace import PROBES, TRACE

FILES = ("config.json", "state.json", "summary.json")
BYTES, VALUES = 150, 60
"""Mutations of each file: of single bytes, of single values."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> store.StudyFolder:
    """One finished trial as this version writes it, its own judgement included."""
    path = tmp_path_factory.mktemp("studies") / "s"
    planted.plant_frame(path)
    config = planted.settings(lr=0.1, steps=60)
    folder = planted.plant_trial(path, config, spikes={40: 9.0}, case="hot")
    body = store.read_json(folder.config_file)
    store.write_sealed(folder.config_file, body)
    source, rules = Source(config, folder.read_state()), Rules()
    rows, probes = folder.rows(TRACE), folder.rows(PROBES)
    assert rows is not None
    write_summary(folder, judge_trial(rows, probes, source, rules), source, rules)
    return store.StudyFolder(path)


def same(a: Tables, b: Tables) -> bool:
    return repr(a.trials) == repr(b.trials) and repr(a.spikes) == repr(b.spikes)


def byte_mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """A byte replaced, doubled, taken out, or a digit or letter made another one of its kind."""
    for _ in range(BYTES):
        at = rng.randrange(len(data))
        old = data[at : at + 1]
        new = bytes([rng.randrange(256)])
        if old.isdigit():
            new = rng.choice([b"0", b"1", b"5", b"9", new])
        elif old.isalpha():
            new = rng.choice([b"a", b"e", b"t", b"n", new])
        yield data[:at] + rng.choice([new, old + old, b""]) + data[at + 1 :]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value inside a JSON value, by the keys that lead to it."""
    if path:
        yield path
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in below:
        yield from places(child, (*path, key))


def value_mutations(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """A value replaced by another of its kind or of another kind, or taken out; the checksum is left as it was."""
    every = list(places(json.loads(data)))
    for _ in range(VALUES):
        body = json.loads(data)
        path = rng.choice(every)
        if path == (store.SEAL,):
            continue  # without its checksum the file is one of an older version, and all of its values are right
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        old = parent[path[-1]]
        others = [None, True, "", "text", [], {}, 0, -1, 1e308, 10**30, "NaN"]
        if isinstance(old, int | float) and not isinstance(old, bool):
            others += [old + 1, old * 1.01, -old, str(old)] * 3
        elif isinstance(old, str):
            others += [old + "x", old[:-1], old.upper()] * 3
        new = rng.choice(others)
        if new == old and type(new) is type(old):
            continue
        if new is None and isinstance(parent, dict):
            del parent[path[-1]]
        else:
            parent[path[-1]] = new
        yield json.dumps(body).encode()


@pytest.mark.parametrize("mutations", [byte_mutations, value_mutations])
@pytest.mark.parametrize("name", FILES)
def test_no_mutation_changes_a_number_silently(
    study: store.StudyFolder, name: str, mutations: Callable[[bytes, random.Random], Iterator[bytes]]
) -> None:
    before = read_tables(study)
    assert len(before.trials) == 1 and before.spikes and not before.computed
    path = study.trials()[0].path / name
    whole, rng, found = path.read_bytes(), random.Random(name), 0
    try:
        for data in mutations(whole, rng):
            path.write_bytes(data)
            after = read_tables(study)
            if after.damaged:
                assert name in after.damaged[0].reason and "\n" not in after.damaged[0].reason
                found += 1
            else:
                assert same(after, before), data
                found += after.computed
    finally:
        path.write_bytes(whole)
    assert found, "nothing was found: the mutations do nothing"
    assert same(read_tables(study), before)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("config", "optim", "beta1"), 0.95),
        (("config", "optim", "warmup_steps"), 9),
        (("config", "data", "tokenizer"), "bytus"),
        (("config", "model", "depth"), 3),
        (("config", "seed"), 1),
        (("config", "objective", "init_from"), "cosine"),
        (("data_fingerprint",), "e" * 16),
        (("cell_id",), "0123456789"),
    ],
)
def test_an_edited_config_of_an_older_version_is_found(tmp_path: Path, where: tuple[str, ...], value: Any) -> None:
    """It has no checksum, and needs none for this: what a trial is called follows from its settings and data."""
    planted.plant_frame(tmp_path / "s")
    folder = planted.plant_trial(tmp_path / "s", planted.settings())
    body = json.loads(folder.config_file.read_text())
    assert store.SEAL not in body
    parent = body
    for key in where[:-1]:
        parent = parent[key]
    parent[where[-1]] = value
    folder.config_file.write_text(json.dumps(body))
    (damaged,) = Study.load(tmp_path / "s").damaged
    assert damaged.trial_id == folder.trial_id and "config.json: was changed" in damaged.reason


@pytest.mark.parametrize(
    "change",
    [
        {"status": "done", "records": {}},
        {"step": -1},
        {"step": True},
        {"init_loss": True},
        {"init_loss": []},
        {"eval_hash": 3},
        {"records": {"trace": {"rows": 119, "sha256": "a" * 64}}},
        {"records": {"trace": {"rows": 120, "sha256": "A" * 64}}},
        {"records": {"trial": {"rows": 120, "sha256": "a" * 64}}},
        {"train_tokens": 1.5},
        {"stop_reason": "completed"},
        {"attempts": [{"host": 1, "pid": 1, "started": "x"}]},
        {"attempts": [{"host": "h", "pid": 1, "started": "x", "engine": []}]},
        {"trial_id": "0123456789"},
        {"spike_events": -3},
        {"init_loss": 10**400},
        {"format": True},
        {"format": 0},
    ],
)
def test_a_state_that_no_version_has_written_excludes_the_trial(tmp_path: Path, change: dict[str, Any]) -> None:
    planted.plant_frame(tmp_path / "s")
    folder = planted.plant_trial(tmp_path / "s", planted.settings())
    body = {k: v for k, v in json.loads(folder.state_file.read_text()).items() if k != store.SEAL}
    folder.state_file.write_text(json.dumps(body))
    assert not Study.load(tmp_path / "s").damaged, "one without a checksum is an older one"
    folder.state_file.write_text(json.dumps(body | change))
    (damaged,) = Study.load(tmp_path / "s").damaged
    assert damaged.trial_id == folder.trial_id and "\n" not in damaged.reason


def test_a_wrong_number_of_rows_with_the_right_checksum_is_found(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    folder = planted.plant_trial(tmp_path / "s", planted.settings())
    body = json.loads(folder.state_file.read_text())
    body["records"]["trace"]["rows"] = 119
    store.write_sealed(folder.state_file, body)
    assert "120 rows, in state.json 119" in Study.load(tmp_path / "s").damaged[0].reason


def test_the_seal_does_not_depend_on_the_layout() -> None:
    body = {"b": 1.0, "a": [1, None, "x\udce4"]}
    sealed = store.sealed(body)
    assert store.opened(json.loads(json.dumps(dict(reversed(sealed.items())), indent=3))) == body
    with pytest.raises(ValueError, match="was changed"):
        store.opened(sealed | {"b": 2.0})
    assert store.opened(body) == body


def test_zclip_trials_of_the_first_version_keep_their_id() -> None:
    config = TrialConfig(optim=OptimConfig(clip_kind="zclip"))
    assert len(cfg.known_ids(config, "f" * 16)) == 2 and cfg.trial_id(config, "f" * 16) in cfg.known_ids(
        config, "f" * 16
    )
    assert cfg.known_ids(TrialConfig(), "f" * 16) == {cfg.trial_id(TrialConfig(), "f" * 16)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["provenance.json", "sweep.yaml"])
def test_a_mutated_record_of_the_question_never_stops_a_report(study: store.StudyFolder, name: str) -> None:
    """And where it was sealed, what was changed is not shown."""
    path = study.path / name
    whole = path.read_bytes()
    if name == "provenance.json":
        store.write_sealed(path, json.loads(whole))
    right, rng = path.read_bytes(), random.Random(name)
    provenance = Study(study).provenance
    try:
        for data in (*byte_mutations(right, rng), b"", b"[]", b"\xff", b"[" * 100_000):
            path.write_bytes(data)
            loaded = Study.load(study.path)
            shown = {k: v for k, v in loaded.provenance.items() if k in provenance}  # of its own
            assert shown in (provenance, {}) and len(loaded.trials) == 1
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("mutations", [byte_mutations, value_mutations])
def test_no_mutation_of_a_checkpoint_resumes_elsewhere(
    tmp_path: Path, mutations: Callable[[bytes, random.Random], Iterator[bytes]]
) -> None:
    """Its tensors at their own step, or the older checkpoint with a note, or a refusal by name."""
    torch = pytest.importorskip("torch")
    from stabstudy.training import checkpoint

    tensors = {step: {"model/w": torch.full((2,), float(step))} for step in (4, 8)}
    for step, state in tensors.items():
        checkpoint.save(tmp_path, "0123456789", state, step)
    path, shapes, rng = tmp_path / "step-00000008" / "state.json", {"model/w": torch.Size([2])}, random.Random(0)
    passed_over = 0
    for data in mutations(path.read_bytes(), rng):
        path.write_bytes(data)
        try:
            step, found, notes = checkpoint.restore(tmp_path, "0123456789", shapes, most=20)
        except checkpoint.CheckpointError as error:
            assert "format" in str(error)
            continue
        assert step in (4, 8) and torch.equal(found["model/w"], tensors[step]["model/w"])
        assert len(notes) == (step == 4)
        passed_over += step == 4
    assert passed_over > 20
