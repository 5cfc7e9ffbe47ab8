"""Examples: rows in every form, their masks in the token cache, and the sequences that are laid out of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stabstudy.config import DataConfig, ObjectiveConfig, SyntheticConfig, TrainConfig, TrialConfig, from_dict
from stabstudy.data import sources, tokens
from stabstudy.data.batches import Batches, open_batches
from stabstudy.data.examples import Example, Reading, examples_or_reason
from stabstudy.data.layouts import IGNORE, hidden, read_tokens
from stabstudy.data.step_texts import text_of_step
from stabstudy.settings import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
CHAT = Example("user: hi\n\nassistant: ", "yo")
BOS, EOS = 256, 257  # of the byte tokenizer


def written(path: Path, rows: list[Any], kind: str = "jsonl") -> DataConfig:
    file = path / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        body = json.dumps(rows).encode() if "json." in f"{file.name}." else lines
        file.write_bytes(gzip.compress(body) if kind.endswith("gz") else body)
    return DataConfig(source="examples", path=str(file))


def pairs(count: int) -> list[dict[str, str]]:
    """Prompts and completions of very unequal lengths, some prompts empty."""
    return [{"prompt": "p" * (i * 7 % 23), "completion": chr(97 + i % 26) * (1 + i * 5 % 17)} for i in range(count)]


# --- rows


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "1+1=", "completion": "2", "label": True}, Example("1+1=", "2")),
        ({"prompt": "", "completion": "2"}, Example("", "2")),
        ({"prompt": [USER], "completion": [ANSWER]}, CHAT),
        ({"messages": [USER, ANSWER], "label": False}, CHAT),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, CHAT),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "system": "s"},
            Example("system: s\n\n" + CHAT.prompt, "yo"),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    USER,
                    ANSWER,
                    USER,
                    {"role": "assistant", "content": "z"},
                ]
            },
            Example("system: s\n\nuser: hi\n\nassistant: yo\n\nuser: hi\n\nassistant: ", "z"),
        ),
    ],
)
def test_a_row_in_every_form(row: Any, example: Example) -> None:
    assert examples_or_reason(row, Reading()) == ([example], "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "x"}, "has no 'prompt' and 'completion', 'messages' or 'conversations', only 'text'"),
        ([1], "must be an object with 'prompt' and 'completion', 'messages' or 'conversations', is list"),
        ({"prompt": "a", "completion": ""}, "has an empty completion"),
        ({"prompt": "a", "completion": None}, "must be of one kind"),
        ({"prompt": [USER], "completion": [ANSWER, ANSWER]}, "'completion' must be one turn, has 2"),
        ({"messages": []}, "'messages' must be a list of turns"),
        ({"messages": [ANSWER, USER]}, "must end with a turn of the assistant, ends with one of 'user'"),
        ({"messages": [{"role": "user"}]}, "must have 'role' and 'content'"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_row_that_is_no_example_says_why_and_where(row: Any, reason: str, tmp_path: Path) -> None:
    assert reason in examples_or_reason(row, Reading())[1]
    config = written(tmp_path, [*pairs(3), row])
    with pytest.raises(DataError) as caught:
        list(sources.documents(config))
    assert str(caught.value).startswith(f"data.path: {config.path}:4: ") and reason in str(caught.value)


def test_some_rows_may_be_bad_where_the_settings_say_so(tmp_path: Path) -> None:
    data = written(tmp_path, [*pairs(1999), {"prompt": "a", "completion": ""}])
    allowed = DataConfig(source="examples", path=data.path, bad_rows=0.001)
    assert len(list(sources.examples(allowed))) == 1999
    said: list[str] = []
    tokens.prepare(allowed, tmp_path, said.append)
    assert any("1 of 2000 rows were unreadable and are left out" in line for line in said)


def test_files_of_every_kind_give_the_same_examples(tmp_path: Path) -> None:
    read = [
        list(sources.examples(written(tmp_path, pairs(40), kind))) for kind in ("jsonl", "json", "json.gz", "parquet")
    ]
    assert read[0] == [Example(row["prompt"], row["completion"]) for row in pairs(40)]
    assert all(other == read[0] for other in read)
    chat = [{"messages": [USER, ANSWER]}] * 2
    assert list(sources.examples(written(tmp_path, chat, "parquet"))) == [CHAT, CHAT]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_damaged_file_is_named(kind: str, tmp_path: Path) -> None:
    config = written(tmp_path, pairs(40), kind)
    file = Path(str(config.path))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(DataError, match=f"rows.{kind}: (must be a JSON array|truncated or damaged after row 0)"):
        list(sources.documents(config))


def test_the_fingerprint_is_of_the_rows_and_not_of_their_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
    rows = [{"messages": [USER, ANSWER]}]
    known = sources.fingerprint(written(first, rows))
    assert sources.fingerprint(written(second, rows)) == known
    other = [{"messages": [{"role": "system", "content": "hi"}, ANSWER]}]
    assert sources.fingerprint(written(second, other)) != known


def test_the_generated_set_is_pinned_and_right() -> None:
    examples = list(sources.examples(DataConfig(source="arithmetic")))
    assert len(examples) == 20_000
    digest = hashlib.sha256("".join(f"{e.prompt}|{e.completion}\n" for e in examples).encode()).hexdigest()
    assert digest[:16] == "c51e47bc2cb788c0"
    for prompt, completion in ((e.prompt, e.completion) for e in examples[:500]):
        question = prompt.removeprefix("What is ").rstrip("=? ").replace(" plus ", "+").replace(" minus ", "-")
        assert completion.rstrip(".").split()[-1] == str(eval(question))  # noqa: S307  # digits and a sign


# --- the cache


def test_the_cache_marks_completions_and_their_ends(tmp_path: Path) -> None:
    corpus = tokens.prepare(written(tmp_path, [{"prompt": "ab", "completion": "c"}, *pairs(30)]), tmp_path)
    assert corpus.mask is not None and len(corpus.mask) == len(corpus.tokens)
    assert corpus.tokens[:5].tolist() == [BOS, 97, 98, 99, EOS] and corpus.mask[:5].tolist() == [0, 0, 0, 1, 1]
    assert corpus.mask.sum() == 2 + sum(len(row["completion"]) + 1 for row in pairs(30))
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert meta["mask_sha256"] == hashlib.sha256((corpus.folder / "mask.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_mask_is_built_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = written(tmp_path, pairs(30))
    first = tokens.prepare(config, tmp_path)
    mask, right = first.folder / "mask.bin", (first.folder / "mask.bin").read_bytes()
    if damage == "gone":
        mask.unlink()
    else:
        mask.write_bytes(right[:-1] if damage == "short" else bytes([1 - right[0]]) + right[1:])
    monkeypatch.setattr(tokens, "_verified", set())
    said: list[str] = []
    again = tokens.prepare(config, tmp_path, said.append)
    assert "is damaged" in said[0] and again.mask is not None and again.mask.tobytes() == right


# --- sequences


def trial(data: DataConfig, **train: Any) -> TrialConfig:
    settings = {"batch_size": 4, "eval_sequences": 4, "final_eval_tokens": 64} | train
    return TrialConfig(objective=ObjectiveConfig("sft"), data=data, train=TrainConfig(**settings))


def laid_out(path: Path, layout: str, seq_len: int, count: int = 200) -> Batches:
    data = written(path, pairs(count))
    data = DataConfig(source="examples", path=data.path, seq_len=seq_len, layout=layout, validation_share=0.2)
    return open_batches(trial(data), path)


def test_packed_sequences_are_those_of_text_with_prompts_hidden(tmp_path: Path) -> None:
    b = laid_out(tmp_path, "packed", 16)
    corpus = b.corpus
    text = Batches(tokens.Corpus(corpus.tokens, corpus.doc_ends, corpus.vocab_size, "f", tmp_path), 16, 4, 0, 0.2, 4, 4)
    for step in (0, 3, 50):
        ours, theirs = b.batch(step), text.batch(step)
        assert np.array_equal(read_tokens(ours), theirs)
        assert corpus.mask is not None
        mask = corpus.mask[text.positions(step)[:, None] + np.arange(17)]
        assert np.array_equal(ours >= 0, mask == 1) and np.array_equal(ours[mask == 0], hidden(theirs[mask == 0]))
    assert np.array_equal(read_tokens(b.evaluation()), text.evaluation())


def test_padded_sequences_are_one_example_each(tmp_path: Path) -> None:
    said: list[str] = []
    b = laid_out(tmp_path, "padded", 20)
    rows = pairs(200)
    whole = [[BOS, *row["prompt"].encode(), *row["completion"].encode(), EOS] for row in rows]
    kept = [i for i, ids in enumerate(whole) if len(rows[i]["prompt"]) + 1 < 21]
    assert b.layout.count == len(kept) and b.layout.dropped == 200 - len(kept) > 0
    assert b.layout.truncated == sum(len(ids) > 21 for ids in whole)
    for number, i in enumerate(kept):
        ids, first = whole[i][:21], len(rows[i]["prompt"]) + 1
        expected = [*(IGNORE - 1 - t for t in ids[:first]), *ids[first:], *[IGNORE] * (21 - len(ids))]
        assert b.layout.windows(np.array([number]))[0].tolist() == expected
        assert b.layout.window(number).documents == (i,)
    path = str(tmp_path / "rows.jsonl")
    data = DataConfig(source="examples", path=path, seq_len=20, layout="padded", validation_share=0.2)
    open_batches(trial(data), tmp_path, said.append)
    assert said[-1] == (
        f"data: {b.layout.truncated} of 200 examples are cut at data.seq_len=20, "
        f"{b.layout.dropped} of them before their completion: left out"
    )


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_final_evaluation_has_as_many_targets_as_were_asked_for(layout: str, tmp_path: Path) -> None:
    data = DataConfig(source="arithmetic", layout=layout, seq_len=64)
    b = open_batches(trial(data, final_eval_tokens=4096), tmp_path)
    targets = int((b.final_evaluation()[:, 1:] >= 0).sum())
    assert 0.9 * 4096 <= targets <= 1.1 * 4096
    whole = open_batches(trial(data, final_eval_tokens=10**8), tmp_path)
    assert len(whole.final_evaluation()) == whole.validation_windows


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_one_array_for_a_device_holds_every_sequence(layout: str, tmp_path: Path) -> None:
    b = laid_out(tmp_path, layout, 16)
    flat = b.layout.flat()
    for step in (0, 1, 30):
        assert np.array_equal(flat[b.positions(step)[:, None] + np.arange(17)], b.batch(step))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_unigram_entropy_and_size_are_of_the_targets_of_one_epoch(layout: str, tmp_path: Path) -> None:
    b = laid_out(tmp_path, layout, 16)
    seen = {w.index: row for step in range(60) for w, row in zip(b.windows(step), b.batch(step), strict=True)}
    assert len(seen) == b.training_windows
    counts = Counter(t for row in seen.values() for t in row[1:].tolist() if t >= 0)
    total = sum(counts.values())
    assert b.training_tokens == total
    assert b.unigram_entropy == pytest.approx(-sum(n / total * math.log(n / total) for n in counts.values()), rel=1e-12)
    assert laid_out(tmp_path, layout, 16).unigram_entropy == b.unigram_entropy, "from the cache"


def test_no_sequence_of_a_padded_epoch_is_both_trained_and_held_out(tmp_path: Path) -> None:
    b = laid_out(tmp_path, "padded", 24)
    held = {row.tobytes() for row in b.layout.windows(b._validation.at(np.arange(b.validation_windows)))}
    trained = [w.index for step in range(b.training_windows // 4) for w in b.windows(step)]
    assert len(set(trained)) == len(trained)
    assert set(trained).isdisjoint(b._validation.at(np.arange(b.validation_windows)).tolist()) and held


def test_the_text_of_a_step_is_what_was_read(tmp_path: Path) -> None:
    data = DataConfig(source="arithmetic", layout="padded", seq_len=64)
    config = trial(data)
    read = text_of_step(config, 3, sources.fingerprint(data), tmp_path)
    examples = [e.prompt + e.completion for e in sources.examples(data)]
    assert [examples[s.documents[0]] in s.text for s in read] == [True] * 4


def test_data_without_a_target_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * 50, "completion": "c"}] * 100
    data = written(tmp_path, rows)
    padded = DataConfig(source="examples", path=data.path, seq_len=16, layout="padded")
    with pytest.raises(DataError, match="data.seq_len: must be larger: no completion of the data begins within"):
        open_batches(trial(padded), tmp_path)
    one = written(tmp_path, [*rows, {"prompt": "p" * 5000, "completion": "c"}])
    few = DataConfig(source="examples", path=one.path, seq_len=16, validation_share=0.01)
    with pytest.raises(DataError, match="the evaluation set, in sequences of so many tokens, has no token of a compl"):
        open_batches(trial(few, eval_sequences=1, final_eval_tokens=1), tmp_path)


# --- text is as it was


@pytest.mark.parametrize(
    ("seed", "batch", "seq_len", "share", "digest"),
    [(0, 8, 32, 0.05, "72cee8a645f1b31a"), (3, 4, 64, 0.2, "cba58b92000184c2")],
)
def test_batches_and_cache_of_text_are_what_they_were_before_there_were_masks(
    seed: int, batch: int, seq_len: int, share: float, digest: str, tmp_path: Path
) -> None:
    """Hashes taken at commit 110f1cb."""
    synthetic = SyntheticConfig(bytes=60_000)
    data = DataConfig(source="synthetic", seq_len=seq_len, validation_share=share, synthetic=synthetic)
    train = TrainConfig(batch_size=batch, eval_sequences=8, final_eval_tokens=1024)
    b = open_batches(TrialConfig(data=data, train=train, seed=seed), tmp_path)
    found = hashlib.sha256()
    for step in (0, 1, 7, 500):
        found.update(b.batch(step).tobytes())
        found.update(b.positions(step).tobytes())
    found.update(b.evaluation().tobytes())
    found.update(b.final_evaluation().tobytes())
    found.update(repr((b.unigram_entropy, b.training_tokens, b.eval_hash, b.windows(3))).encode())
    assert found.hexdigest()[:16] == digest
    assert b.corpus.folder.name == "cdcab4a4e94ded50"
    meta = (b.corpus.folder / "meta.json").read_bytes()
    assert hashlib.sha256(meta).hexdigest()[:16] == "efae76494eea5ad7"
    assert {p.name for p in b.corpus.folder.iterdir()} == {
        *("tokens.bin", "docs.bin", "meta.json", f"unigram-{seq_len}-{share!r}.json")
    }


# --- refusals


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"objective": {"kind": "sft"}},
            "objective.kind, data.source: objective sft reads prompts with completions: data=sft (your rows at "
            "data.path), data=arithmetic, got sft and pysrc",
        ),
        (
            {"data": {"source": "arithmetic"}},
            "objective.kind, data.source: source arithmetic gives prompts with completions, which objective=sft reads, "
            "got lm and arithmetic",
        ),
        (
            {"data": {"layout": "padded"}},
            "data.layout: has an effect with sources examples, hub_examples, arithmetic, arithmetic_graded only, got "
            "source pysrc",
        ),
        (
            {"data": {"source": "examples"}, "objective": {"kind": "sft"}},
            "data.path: source examples needs a path, got null",
        ),
    ],
)
def test_an_objective_and_a_source_that_do_not_fit_are_told_what_does(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(values)
    assert str(caught.value) == line


def test_chat_rows_given_as_text_are_answered_with_the_objective_that_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    with pytest.raises(DataError, match=r"only 'messages' \(chat data are read by objective=sft data=sft data.path="):
        sources.check(DataConfig(source="jsonl", path=str(path)))


@pytest.mark.shareddata
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_the_300_real_rows_are_examples(layout: str, shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "kto_en_demo.json"
    data = DataConfig(source="examples", path=str(path), seq_len=512, layout=layout)
    rows = json.loads(path.read_text())
    examples = list(sources.examples(data))
    assert [e.completion for e in examples] == [row["messages"][-1]["content"] for row in rows] and len(rows) == 300
    b = open_batches(trial(data), tmp_path)
    assert b.corpus.mask is not None
    assert b.corpus.mask.sum() == sum(len(e.completion.encode()) + 1 for e in examples)
    assert (b.batch(0)[:, 1:] >= 0).any()
