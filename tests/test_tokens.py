"""Tokenizers, and the token cache: built once whatever happens, never wrong, never remote code."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from stabstudy.config import DataConfig, SyntheticConfig
from stabstudy.data import files, tokenizer, tokens
from stabstudy.data.tokenizer import Tokenizer
from stabstudy.data.tokens import default_cache_dir, existing_cache_dir, prepare
from stabstudy.settings import DataError

TEXTS = ["hello", "\u00fc\u6771\U0001f680", "a longer one, with words"]


@pytest.fixture
def source(tmp_path: Path) -> DataConfig:
    """Three documents in a .jsonl file."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return DataConfig(source="jsonl", path=str(path))


def small_bpe(folder: Path, **config: Any) -> Path:
    """A trained tokenizer.json (and a tokenizer_config.json where `config` says something); its folder."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TEXTS * 3, trainer)
    trained.enable_truncation(4)  # as many published files have
    trained.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    trained.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


# --- tokenizers


def test_bytes_are_linguas(source: DataConfig, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path)
    expected = [id for text in TEXTS for id in (256, *text.encode(), 257)]
    assert corpus.tokens.tolist() == expected
    assert corpus.vocab_size == 258
    assert corpus.doc_ends.tolist() == np.cumsum([len(t.encode()) + 2 for t in TEXTS]).tolist()
    assert corpus.tokens.dtype == np.dtype("<u2")


@pytest.mark.shareddata
@pytest.mark.parametrize("spelling", ["folder", "pair"])
def test_gpt2_from_its_two_files(shared_data: Path, spelling: str) -> None:
    pair = f"{shared_data / 'gpt2_encoder.json'},{shared_data / 'gpt2_vocab.bpe'}"
    gpt2 = tokenizer.load(str(shared_data) if spelling == "folder" else pair)
    assert [ids.tolist() for ids in gpt2.encode(["Hello world", " Hello"])] == [[15496, 995], [18435]]
    assert (gpt2.vocab_size, gpt2.bos, gpt2.eos) == (50257, None, 50256)
    # A document cannot end itself: GPT-2 spells the text of its end token with seven ordinary tokens.
    assert gpt2.encode(["<|endoftext|>"])[0].tolist() == [27, 91, 437, 1659, 5239, 91, 29]


@pytest.mark.shareddata
def test_gpt2_on_real_text(shared_data: Path, tmp_path: Path) -> None:
    config = DataConfig(source="jsonl", path=str(shared_data / "c4_demo.jsonl"), tokenizer=str(shared_data))
    corpus = prepare(config, tmp_path)
    assert len(corpus.doc_ends) == 300
    assert (corpus.tokens[corpus.doc_ends.astype(int) - 1] == 50256).all()
    lines = (shared_data / "c4_demo.jsonl").read_text().splitlines()
    text = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert 4.5 < text / (len(corpus.tokens) - 300) < 4.7  # bytes per token, of ordinary web text


def test_a_tokenizer_json_in_a_folder_or_by_itself(tmp_path: Path) -> None:
    folder = small_bpe(tmp_path / "bpe")
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    for name in (str(folder), str(folder / "tokenizer.json")):
        loaded = tokenizer.load(name)
        assert (loaded.vocab_size, loaded.bos, loaded.eos) == (reference.get_vocab_size(), 0, 1)  # by their usual names
        assert [ids.tolist() for ids in loaded.encode(TEXTS)] == [reference.encode(text).ids for text in TEXTS]
        assert not set(loaded.encode(["</s><s>"])[0].tolist()) & {0, 1, 2}  # text forges no border


@pytest.mark.parametrize(
    ("config", "bos", "eos"),
    [
        ({"bos_token": "<pad>", "eos_token": {"content": "</s>", "special": True}}, 2, 1),
        ({"bos_token": None, "eos_token": "</s>"}, None, 1),
        ({"bos_token": "</s>", "eos_token": "</s>"}, None, 1),  # one token for both: once between documents
    ],
)
def test_the_borders_are_what_the_tokenizers_config_says(
    tmp_path: Path, config: dict[str, Any], bos: int | None, eos: int | None
) -> None:
    loaded = tokenizer.load(str(small_bpe(tmp_path / "bpe", **config)))
    assert (loaded.bos, loaded.eos) == (bos, eos)


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("token", ["nowhere", {"content": "nowhere", "special": True}])
def test_a_named_border_that_the_vocabulary_lacks_is_refused(tmp_path: Path, key: str, token: Any) -> None:
    folder = small_bpe(tmp_path / "bpe", **{key: token})
    with pytest.raises(DataError, match=f"data.tokenizer: .* names an {key} that the vocabulary lacks, got 'nowhere'"):
        tokenizer.load(str(folder))


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_bpe(tmp_path / "bpe")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DataError, match=r"data.tokenizer: must be readable \(Permission denied\)"):
        tokenizer.identity(str(folder))


def test_any_local_tokenizer_through_transformers(tmp_path: Path, source: DataConfig) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "byt5")  # not in any file format of `tokenizers`
    (tmp_path / "byt5/tokenizer.json").unlink(missing_ok=True)
    loaded = tokenizer.load(str(tmp_path / "byt5"))
    assert loaded.encode(["ab"])[0].tolist() == [ord("a") + 3, ord("b") + 3]
    assert (loaded.bos, loaded.eos) == (None, 1)
    corpus = prepare(dataclasses.replace(source, tokenizer=str(tmp_path / "byt5")), tmp_path)
    assert corpus.tokens[:6].tolist() == [*(b + 3 for b in b"hello"), 1]


def test_a_tokenizers_own_code_never_runs(tmp_path: Path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    body = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"data.tokenizer: .*"):
        tokenizer.load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pair", tokenizer.PAIRS)
def test_one_file_of_two_is_answered_with_their_folder(tmp_path: Path, pair: tuple[str, str]) -> None:
    vocab, merges = (tmp_path / name for name in pair)
    vocab.write_text('{"a": 0, "b": 1, "ab": 2}')
    merges.write_text("#version: 0.2\na b\n")
    for file in (vocab, merges):
        with pytest.raises(DataError, match="is one of two files that are a tokenizer together: name their f") as found:
            tokenizer.identity(str(file))
        assert found.value.problem.rule.endswith(f" folder, {tmp_path}")
    assert tokenizer.load(str(tmp_path)).encode(["ab"])[0].tolist() == [2], "what the message says to name"
    assert tokenizer.load(f"{vocab},{merges}").encode(["ab"])[0].tolist() == [2]
    vocab.unlink()
    with pytest.raises(DataError, match="one file must be a tokenizer.json; write bytes"):
        tokenizer.identity(str(merges))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./missing/tokenizer.json", "must be a file that exists"),
        ("/missing/folder", "must be a file that exists"),
        ("vocab.json,merges.txt", "must be a file that exists"),
        ("nobody/nothing", "cannot be loaded"),
        ("nobody/nothing@0123abc", "cannot be loaded"),
        ("{folder}", "the folder holds no tokenizer; write bytes, "),
        (
            "{folder}/bomb.pkl",
            "one file must be a tokenizer.json; .* or gpt2_encoder.json and gpt2_vocab.bpe",
        ),
        ("{folder}/broken.json", "cannot be loaded"),
        ("{folder}/broken.json,{folder}/bomb.pkl", "cannot be loaded"),
    ],
)
def test_names_that_are_no_tokenizer(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "bomb.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (tmp_path / "broken.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=f"data.tokenizer: .*{said}") as caught:
        tokenizer.load(name.format(folder=tmp_path))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_that_does_not_fit_its_ids_is_refused_with_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 90_000}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(DataError, match="must fit its ids, got 3 tokens, largest id 90000"):
        tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("id", [-1, 300])
def test_an_id_outside_the_vocabulary_stops_the_build(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id: int
) -> None:
    def encode(texts: list[str]) -> list[Any]:
        return [np.array([1, 2, id])] * len(texts)

    monkeypatch.setattr(tokens.tokenizer, "load", lambda name: Tokenizer(300, None, 0, "x", encode, repr))
    with pytest.raises(DataError, match=rf"token 2 of the corpus must have an id in 0..299, got {id}"):
        prepare(source, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache/tokens").iterdir()] == [".lock"]


def test_text_without_a_single_token_is_refused(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(texts: list[str]) -> list[Any]:
        return [np.array([], np.int64)] * len(texts)

    monkeypatch.setattr(tokens.tokenizer, "load", lambda name: Tokenizer(300, None, None, "x", encode, repr))
    with pytest.raises(DataError, match="data.tokenizer: gives no token for this text, got 'bytes'"):
        prepare(source, tmp_path)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_a_token_takes_two_bytes_while_the_vocabulary_fits(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocab_size: int, dtype: str
) -> None:
    def encode(texts: list[str]) -> list[Any]:
        return [np.array([0, vocab_size - 1])] * len(texts)

    monkeypatch.setattr(tokens.tokenizer, "load", lambda name: Tokenizer(vocab_size, None, None, "x", encode, repr))
    corpus = prepare(source, tmp_path)
    assert corpus.tokens.dtype == np.dtype(dtype)
    assert corpus.tokens.tolist() == [0, vocab_size - 1] * 3


# --- the cache


def test_a_corpus_is_read_only_and_knows_its_documents(source: DataConfig, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path)
    owners = np.repeat(np.arange(3), np.diff(corpus.doc_ends.astype(int), prepend=0))
    assert [corpus.document_of(i) for i in range(len(corpus.tokens))] == owners.tolist()
    with pytest.raises(ValueError, match="read-only"):
        corpus.tokens[0] = 1


def test_many_batches_give_what_one_gives(source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(source, tokenizer=str(small_bpe(tmp_path / "bpe")))
    whole = prepare(config, tmp_path / "a")
    monkeypatch.setattr(tokens, "BATCH", 1)
    parts = prepare(config, tmp_path / "b")
    assert np.array_equal(whole.tokens, parts.tokens)
    assert np.array_equal(whole.doc_ends, parts.doc_ends)


def test_the_second_call_builds_nothing(source: DataConfig, tmp_path: Path) -> None:
    said: list[str] = []
    first = prepare(source, tmp_path, said.append)
    assert len(said) == 2 and "tokenizing" in said[0]
    (tmp_path / "data.jsonl").touch()
    second = prepare(source, tmp_path, said.append)
    assert len(said) == 2
    assert first.folder == second.folder
    changed = dataclasses.replace(source, seq_len=9, validation_share=0.4)
    assert prepare(changed, tmp_path, said.append).folder == first.folder
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    assert prepare(source, tmp_path).folder != first.folder


def test_what_meta_says(source: DataConfig, tmp_path: Path) -> None:
    corpus = prepare(source, tmp_path)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["fingerprint"] == corpus.fingerprint
    assert (meta["tokens"], meta["documents"], meta["rows"], meta["rows_skipped"]) == (len(corpus.tokens), 3, 3, 0)
    for name in ("tokens", "docs"):
        content = (corpus.folder / f"{name}.bin").read_bytes()
        assert meta[f"{name}_sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(p.name for p in corpus.folder.iterdir()) == ["docs.bin", "meta.json", "tokens.bin"]


def test_skipped_rows_are_said_and_kept_in_meta(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * 1999 + "{}\n")
    said: list[str] = []
    corpus = prepare(DataConfig(source="jsonl", path=str(path), bad_rows=0.001), tmp_path, said.append)
    assert json.loads((corpus.folder / "meta.json").read_text())["rows_skipped"] == 1
    assert f"1 of 2000 rows were unreadable and are left out; the first: {path}:2000" in "\n".join(said)


DAMAGES = {
    "a flipped token": lambda folder: flip(folder / "tokens.bin"),
    "a flipped document end": lambda folder: flip(folder / "docs.bin"),
    "tokens cut": lambda folder: os.truncate(folder / "tokens.bin", 4),
    "tokens empty": lambda folder: os.truncate(folder / "tokens.bin", 0),
    "tokens gone": lambda folder: (folder / "tokens.bin").unlink(),
    "documents gone": lambda folder: (folder / "docs.bin").unlink(),
    "meta cut": lambda folder: os.truncate(folder / "meta.json", 40),
    "meta gone": lambda folder: (folder / "meta.json").unlink(),
    "meta of another shape": lambda folder: (folder / "meta.json").write_text('{"format": 1}'),
    "meta no object": lambda folder: (folder / "meta.json").write_text("[1]"),
    "meta of another dtype": lambda folder: edit(folder / "meta.json", dtype="O"),
    "meta of another format": lambda folder: edit(folder / "meta.json", format=99),
    "meta of other data": lambda folder: edit(folder / "meta.json", fingerprint="0" * 16),
}


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_again(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any
) -> None:
    before = prepare(source, tmp_path).tokens.tolist()
    folder = prepare(source, tmp_path).folder
    damage(folder)
    monkeypatch.setattr(tokens, "_verified", set())  # as a new process
    said: list[str] = []
    assert prepare(source, tmp_path, said.append).tokens.tolist() == before
    assert "damaged" in said[0]
    assert sorted(p.name for p in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert sorted(p.name for p in folder.iterdir()) == ["docs.bin", "meta.json", "tokens.bin"]


def test_checksums_are_verified_once_per_process(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(source, tmp_path)
    hashed: list[int] = []
    real = hashlib.sha256

    def counting(data: Any = b"") -> Any:
        hashed.append(len(data))
        return real(data)

    monkeypatch.setattr(tokens.hashlib, "sha256", counting)
    prepare(source, tmp_path)
    often = len(hashed)
    monkeypatch.setattr(tokens, "_verified", set())
    prepare(source, tmp_path)
    assert len(hashed) - often == often + 2


def test_data_that_changes_while_it_is_read_is_refused(source: DataConfig, tmp_path: Path) -> None:
    def say(line: str) -> None:
        if "tokenizing" in line:
            Path(source.path or "").write_text(json.dumps({"text": "changed"}) + "\n")

    with pytest.raises(DataError, match="must not change while it is read"):
        prepare(source, tmp_path / "cache", say)
    assert prepare(source, tmp_path / "cache").tokens.tolist() == [256, *b"changed", 257]


def test_an_error_in_the_data_leaves_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{}\n')
    with pytest.raises(DataError, match="x.jsonl:2"):
        prepare(DataConfig(source="jsonl", path=str(path)), tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache/tokens").iterdir()] == [".lock"]


# --- a line now and then


def timed(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A clock that moves by so much whenever it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(files, "clock", lambda: next(ticks) * seconds)


def test_tokenizing_tells_how_far_it_is_every_five_seconds(
    source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text((json.dumps({"text": "x" * 1000}) + "\n") * 40)
    monkeypatch.setattr(tokens, "BATCH", 2000)  # two documents at once: 20 batches
    timed(monkeypatch, 2.0)
    said: list[str] = []
    prepare(dataclasses.replace(source, path=str(path)), tmp_path / "cache", said.append)
    first, *lines, last = said
    assert first.startswith("data: tokenizing ") and last == "data: 40,080 tokens in 40 documents"
    # a batch takes 2 s: the third is the first behind 5 s, and from there every third again
    assert [line.split(":")[1].strip() for line in lines] == [
        f"tokenized {2 * batch} documents" for batch in (3, 6, 9, 12, 15, 18)
    ]
    assert lines[0] == "data: tokenized 6 documents: 0.0 million characters in 6 s, 0.001 a second"


def test_quick_work_is_silent(source: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 4.9)
    said: list[str] = []
    prepare(source, tmp_path / "cache", said.append)
    assert len(said) == 2


def test_the_rate_is_that_of_the_whole_work(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 104.0, 105.0, 109.0, 111.0])
    monkeypatch.setattr(files, "clock", lambda: next(times))
    said: list[str] = []
    shown = files.Progress(said.append, "MB")
    for done in (10, 20, 5000, 5500):
        shown.update("work", done)
    assert said == ["data: work: 20.0 MB in 5 s, 4 a second", "data: work: 5,500.0 MB in 11 s, 500 a second"]


# --- many processes


def build_at_once(config: DataConfig, cache: Path, barrier: Barrier, results: Queue[Any]) -> None:
    """In a process of its own: everybody starts together, and reports what was said and seen."""
    said: list[str] = []
    barrier.wait(timeout=60)
    corpus = prepare(config, cache, said.append)
    results.put((said, hashlib.sha256(corpus.tokens.tobytes()).hexdigest()))


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    spawn = mp.get_context("spawn")
    config = DataConfig(source="synthetic", synthetic=SyntheticConfig(bytes=400_000))
    barrier, results = spawn.Barrier(4), spawn.Queue()
    workers = [spawn.Process(target=build_at_once, args=(config, tmp_path, barrier, results)) for _ in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert len({sha for _, sha in found}) == 1
    assert sum(any(line.startswith("data: tokenizing") for line in said) for said, _ in found) == 1
    assert not [line for said, _ in found for line in said if "damaged" in line]
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # the corpus and its lock


def killed_while_building(config: DataConfig, cache: Path) -> None:
    def say(line: str) -> None:
        if "documents" in line:  # the last thing said: all is written, nothing renamed
            os.kill(os.getpid(), signal.SIGKILL)

    prepare(config, cache, say)


def test_a_killed_builder_leaves_nothing_that_counts(source: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    victim = mp.get_context("spawn").Process(target=killed_while_building, args=(source, cache))
    victim.start()
    victim.join(timeout=60)
    assert victim.exitcode == -signal.SIGKILL
    assert [p for p in (cache / "tokens").iterdir() if p.suffix == ".tmp"]  # the kill came in the middle
    said: list[str] = []
    corpus = prepare(source, cache, said.append)
    assert corpus.tokens[0] == 256
    assert not [line for line in said if "damaged" in line or "waiting" in line]  # its lock died with it
    assert sorted(p.suffix for p in (cache / "tokens").iterdir()) == ["", ".lock"]


# --- where the cache lies


def test_default_cache_dir_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("STABSTUDY_CACHE", raising=False)
    assert default_cache_dir() == tmp_path / "home/.cache/stabstudy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/stabstudy"
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.setenv("STABSTUDY_CACHE", "/proc/nowhere")
    with pytest.raises(DataError, match="STABSTUDY_CACHE.*'/proc/nowhere'"):
        default_cache_dir()


def test_who_only_looks_for_the_cache_creates_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("STABSTUDY_CACHE", raising=False)
    assert existing_cache_dir() is None and not list(tmp_path.iterdir())
    assert default_cache_dir() == existing_cache_dir() == tmp_path / "xdg/stabstudy"
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path / "own"))
    assert existing_cache_dir() is None and not (tmp_path / "own").exists()
    assert default_cache_dir() == existing_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("STABSTUDY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    (tmp_path / "tmp").mkdir()
    assert existing_cache_dir() is None
    shared = default_cache_dir()
    assert shared.parent == tmp_path / "tmp" and existing_cache_dir() == shared
    shared.chmod(0o777)
    assert existing_cache_dir() is None


def test_tokens_are_counted_without_opening_them(source: DataConfig, tmp_path: Path) -> None:
    assert tokens.count("f" * 16, tmp_path) is None
    corpus = prepare(source, tmp_path)
    (corpus.folder / "tokens.bin").unlink()
    assert tokens.count(corpus.fingerprint, tmp_path) == len(corpus.tokens)
    edit(corpus.folder / "meta.json", format=99)
    assert tokens.count(corpus.fingerprint, tmp_path) is None


def test_without_a_home_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("STABSTUDY_CACHE", raising=False)
    monkeypatch.setattr(tokens.tempfile, "tempdir", str(tmp_path))
    shared = default_cache_dir()
    assert shared.parent == tmp_path and shared.stat().st_mode & 0o777 == 0o700
    assert default_cache_dir() == shared  # of all processes of one user
    shared.chmod(0o777)  # somebody else could put tokens there
    assert default_cache_dir() not in (shared, None)


def test_tokens_need_no_torch(source: DataConfig, tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from stabstudy.config import DataConfig
from stabstudy.data.batches import Batches
from stabstudy.data.tokens import prepare

corpus = prepare(DataConfig(source="jsonl", path=sys.argv[1], tokenizer=sys.argv[2]), Path(sys.argv[3]))
Batches(corpus, 2, 1, 0, 0.2, 1).batch(0)
print(sorted({"torch", "ray", "hydra", "pandas", "transformers"} & set(sys.modules)))
"""
    arguments = [source.path or "", str(small_bpe(tmp_path / "bpe")), str(tmp_path)]
    out = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
