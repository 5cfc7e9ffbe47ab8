"""Edits of large files between the samples: seen by a memory, and never at the price of an unchanged file's name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from stabstudy import store
from stabstudy.config import DataConfig
from stabstudy.data import files
from stabstudy.data.files import Memory
from stabstudy.data.sources import fingerprint
from stabstudy.data.tokens import prepare
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.settings import ConfigError, DataError

SIZE = 3 << 20  # bytes of the large file
BETWEEN = 100 << 10  # a place that no sample holds: they are 64 kB each, 200 kB apart


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 2 << 20)


@pytest.fixture
def big(tmp_path: Path) -> DataConfig:
    """A text of one large file."""
    path = tmp_path / "text" / "big.txt"
    path.parent.mkdir()
    path.write_bytes(b"a line of some text\n" * (SIZE // 20) + b"x" * (SIZE % 20))
    os.utime(path, ns=(10**18, 10**18))
    return DataConfig(source="text", path=str(path))


@pytest.fixture
def learns(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "cache", learn=True)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every file that is hashed whole."""
    names: list[str] = []
    real = Memory._sha256

    def counting(memory: Memory, path: Path) -> str:
        names.append(path.name)
        return real(memory, path)

    monkeypatch.setattr(Memory, "_sha256", counting)
    return names


def edit(config: DataConfig, text: bytes = b"EDITED", later: int = 10**9) -> None:
    """Same size, between the samples; `later`: nanoseconds by which the time of change moves."""
    path = Path(config.path or "")
    then = path.stat().st_mtime_ns
    with path.open("r+b") as f:
        f.seek(BETWEEN)
        f.write(text)
    os.utime(path, ns=(then + later, then + later))


def original(config: DataConfig) -> bytes:
    return (b"a line of some text\n" * 10_000)[BETWEEN : BETWEEN + 6]


def sampled(config: DataConfig) -> str:
    """What such a file's fingerprint has always been: from its name, its size and 16 blocks."""
    body, blocks = Path(config.path or "").read_bytes(), hashlib.sha256()
    for i in range(16):
        start = i * (len(body) - 65_536) // 15
        blocks.update(body[start : start + 65_536])
    content = hashlib.sha256(json.dumps(["big.txt", len(body), blocks.hexdigest()]).encode()).hexdigest()
    whole = {
        "version": 1, "source": "text", "content": {"content": content}, "max_bytes": config.max_bytes,
        "bad_rows": 0.0, "tokenizer": "bytes",
    }  # fmt: skip
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def test_no_unchanged_file_gets_another_name(big: DataConfig, learns: Memory, hashed: list[str]) -> None:
    name = sampled(big)
    assert fingerprint(big) == name and fingerprint(big, Memory(learns.cache_dir)) == name
    assert hashed == [] and not learns.cache_dir.exists(), "who only plans neither reads it whole nor writes"
    assert fingerprint(big, learns) == name == fingerprint(big, learns) and hashed == ["big.txt"]


def test_without_a_memory_the_edit_is_not_seen(big: DataConfig) -> None:
    """The negative control: what the memory is for."""
    before = fingerprint(big)
    edit(big)
    assert fingerprint(big) == before == sampled(big)


def test_an_edit_is_seen_and_taken_back(big: DataConfig, learns: Memory, hashed: list[str]) -> None:
    plans = Memory(learns.cache_dir)
    before = fingerprint(big, learns)
    edit(big)
    after = fingerprint(big, plans)
    assert after != before and fingerprint(big, learns) == after
    assert len(hashed) == 2, "each state of the file once"
    edit(big, b"AGAIN!")
    assert len({before, after, fingerprint(big, learns)}) == 3
    edit(big)
    assert fingerprint(big, learns) == after, "the same text has the same name"
    edit(big, original(big))
    assert fingerprint(big, learns) == before and len(hashed) == 5


def test_a_touched_file_is_sha256_once_more_and_keeps_its_name(
    big: DataConfig, learns: Memory, hashed: list[str]
) -> None:
    before = fingerprint(big, learns)
    for when in (2 * 10**18, 3 * 10**18):
        os.utime(big.path or "", ns=(when, when))
        assert [fingerprint(big, learns) for _ in range(3)] == [before] * 3
    assert len(hashed) == 3


def test_a_moved_file_keeps_its_name(big: DataConfig, learns: Memory, tmp_path: Path) -> None:
    before = fingerprint(big, learns)
    (tmp_path / "there").mkdir()
    shutil.move(big.path or "", tmp_path / "there" / "big.txt")
    moved = DataConfig(source="text", path=str(tmp_path / "there" / "big.txt"))
    assert fingerprint(moved, learns) == before
    edit(moved)
    assert fingerprint(moved, learns) != before, "what was there first is known by its samples, not by its place"


def test_files_of_other_sizes_are_no_edits_of_each_other(tmp_path: Path, learns: Memory) -> None:
    """Zeros sample alike at every size."""
    for size in (SIZE, SIZE + 1):
        (tmp_path / f"{size}.txt").write_bytes(b"x" * size)
        config = DataConfig(source="text", path=str(tmp_path / f"{size}.txt"))
        assert fingerprint(config, learns) == fingerprint(config)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"first": 3, "seen": {}}', '{"first": "a", "seen": 3}', None])
def test_a_damaged_memory_is_none(big: DataConfig, learns: Memory, hashed: list[str], damage: str | None) -> None:
    before = fingerprint(big, learns)
    (file,) = (learns.cache_dir / "files").iterdir()
    file.unlink() if damage is None else file.write_text(damage)
    assert fingerprint(big, Memory(learns.cache_dir)) == before and len(hashed) == 1
    assert fingerprint(big, learns) == before and len(hashed) == 2
    edit(big)
    assert fingerprint(big, learns) != before, "it was learned anew"


@pytest.mark.parametrize("known", [3, [], ["a", "b", "c"], [SIZE, 10**18], [True, 10**18, "a"]])
def test_a_damaged_entry_is_sha256_again(big: DataConfig, learns: Memory, hashed: list[str], known: Any) -> None:
    before = fingerprint(big, learns)
    (file,) = (learns.cache_dir / "files").iterdir()
    body = store.read_json(file)
    store.write_json(file, body | {"seen": dict.fromkeys(body["seen"], known)})
    assert fingerprint(big, learns) == before and len(hashed) == 2


def test_a_memory_that_cannot_be_written_is_used_as_far_as_it_goes(
    big: DataConfig, learns: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(big, learns)
    edit(big)

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store, "write_json", read_only)
    assert fingerprint(big, learns) != before
    assert fingerprint(big, Memory(learns.cache_dir.with_name("none"), learn=True)) == before


def test_what_it_cannot_see(big: DataConfig, learns: Memory) -> None:
    """As its docstring says: an edit with the time of change put back, and one from before the first look."""
    before = fingerprint(big, learns)
    edit(big, later=0)
    assert fingerprint(big, learns) == before
    shutil.rmtree(learns.cache_dir)
    edit(big, b"BEFORE")
    assert fingerprint(big, learns) == before


def test_much_of_which_a_part_is_read_is_not_sha256_whole(
    big: DataConfig, learns: Memory, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part = DataConfig(source="text", path=big.path, max_bytes=SIZE)
    assert fingerprint(part, learns) and hashed == ["big.txt"]
    shutil.rmtree(learns.cache_dir)
    monkeypatch.setattr(files, "MANY", 2 << 20)
    assert fingerprint(part, learns) and hashed == ["big.txt"]
    assert fingerprint(big, learns) and hashed == ["big.txt"] * 2


@pytest.mark.parametrize("source", ["jsonl", "lingua", "hf"])
def test_other_sources_of_files(source: str, tmp_path: Path, learns: Memory) -> None:
    row = json.dumps({"text": "words " * 30}).encode() + b"\n"
    path = tmp_path / "local" / "a.chunk.0.jsonl"
    path.parent.mkdir()
    path.write_bytes(row * (SIZE // len(row)))
    config = DataConfig(source=source, path=str(path.parent))
    before = fingerprint(config, learns)
    assert before == fingerprint(config)
    edit(dataclasses.replace(config, path=str(path)))
    assert fingerprint(config) == before != fingerprint(config, learns)


# where it matters


def test_the_edited_text_is_tokenized_anew(big: DataConfig, learns: Memory) -> None:
    first = prepare(big, learns.cache_dir)
    assert prepare(big, learns.cache_dir).folder == first.folder
    edit(big)
    second = prepare(big, learns.cache_dir)
    assert second.folder != first.folder
    assert bytes(second.tokens[1 + BETWEEN : 7 + BETWEEN].tolist()) == b"EDITED"
    with pytest.raises(DataError, match="data: must still be what the study began with"):
        prepare(big, learns.cache_dir, expected=first.fingerprint)


def test_a_study_on_the_text_before_is_refused(big: DataConfig, tmp_path: Path) -> None:
    words = ["data=text", f"data.path={big.path}", "seeds=1", "study=s", f"compute.cache_dir={tmp_path}/cache"]

    def planned() -> Plan:
        return make_plan(words, tmp_path)

    first = planned()
    prepare(big, tmp_path / "cache")  # as the launch does
    first.folder.mkdir(parents=True)
    (first.folder / "sweep.yaml").write_text(first.sweep_text)
    assert planned().trials == first.trials
    edit(big)
    with pytest.raises(ConfigError, match="the text of source text has changed since this study began"):
        planned()
    edit(big, original(big))
    assert planned().trials == first.trials


def test_hashing_that_takes_long_tells(big: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "clock", iter(range(100)).__next__)  # a second for each block
    monkeypatch.setattr(files, "BLOCK", SIZE // 12)
    lines: list[str] = []
    fingerprint(big, Memory(tmp_path / "cache", learn=True, say=lines.append))
    assert lines == [
        "data: hashing big.txt, once, to know later edits of it: 1.3 MB in 5 s, 0.262 a second",
        "data: hashing big.txt, once, to know later edits of it: 2.6 MB in 10 s, 0.262 a second",
    ]
