"""How many tokens there are: exact where a cache knows, else a bound that is one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_batches import corpus
from test_tokens import small_bpe

from stabstudy.config import DataConfig, SyntheticConfig
from stabstudy.data.batches import Batches, Supply, most_tokens, supply, training_windows
from stabstudy.data.sources import fingerprint
from stabstudy.data.tokens import prepare
from stabstudy.settings import DataError

DOCUMENTS = ["hello", '\u00fc\u6771\U0001f680 "quoted"\n', "x", "a longer one, with words " * 20]


def written(source: str, folder: Path) -> DataConfig:
    folder.mkdir()
    for i, document in enumerate(DOCUMENTS):
        if source == "text":
            (folder / f"{i}.txt").write_text(document)
        else:
            name = "a.chunk.0.jsonl" if source == "lingua" else "a.jsonl"
            with (folder / name).open("a") as f:
                f.write(json.dumps({"text": document}, ensure_ascii=i % 2 == 0, separators=(",", ":")) + "\n")
    return DataConfig(source=source, path=str(folder))


SYNTHETIC: list[dict[str, Any]] = [
    {}, {"tail_milli": 0}, {"tail_milli": 10_000}, {"burst_permille": 1000},
    {"vocabulary": 2, "tail_milli": 10_000}, {"duplicate_permille": 1000}, {"nesting": 0},
]  # fmt: skip
CONFIGS = [
    *({"source": s} for s in ("text", "jsonl", "lingua", "pysrc")),
    *({"source": "synthetic", "knobs": k} for k in SYNTHETIC),
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_the_bound_holds_and_is_near(values: dict[str, Any], tmp_path: Path) -> None:
    source = values["source"]
    if source in ("text", "jsonl", "lingua"):
        config = written(source, tmp_path / "in")
    else:
        config = DataConfig(source, synthetic=SyntheticConfig(**{"bytes": 60_000} | values.get("knobs", {})))
    there = len(prepare(config, tmp_path / "cache").tokens)
    bound = most_tokens(config)
    assert bound is not None and there <= bound
    if source in ("text", "pysrc"):
        assert bound <= there * 1.0001, "bytes of text and two marks a document: known to the byte"
    elif source == "synthetic":
        assert bound <= there * 1.05
    if source == "text":
        bpe = prepare(dataclasses.replace(config, tokenizer=str(small_bpe(tmp_path / "bpe"))), tmp_path / "cache")
        assert len(bpe.tokens) < bound, "a token of another tokenizer is a byte or more"


@pytest.mark.parametrize("limit", [50, 700, 10**9])
def test_max_bytes_bounds_too(limit: int, tmp_path: Path) -> None:
    config = dataclasses.replace(written("text", tmp_path / "in"), max_bytes=limit)
    bound = most_tokens(config)
    assert bound is not None and len(prepare(config, tmp_path / "cache").tokens) <= bound + 8
    assert bound <= 1.05 * limit + 2 and bound <= sum(len(d.encode()) + 2 for d in DOCUMENTS)


def test_what_no_size_tells(tmp_path: Path) -> None:
    packed = written("jsonl", tmp_path / "in")
    (tmp_path / "in" / "a.jsonl").rename(tmp_path / "in" / "a.jsonl.zst")
    hub = DataConfig(source="hf", path="allenai/c4")
    for config in (packed, hub, DataConfig(source="parquet", path="somewhere")):
        assert most_tokens(config) is None and supply(config, "f" * 16, None) is None
        cut = dataclasses.replace(config, max_bytes=10_000)
        assert most_tokens(cut) == 10_202
        known = supply(cut, "f" * 16, tmp_path)
        assert known == Supply(training_windows(10_202, 128, 0.05) * 128, exact=False)


@pytest.mark.parametrize(("seq_len", "share"), [(8, 0.05), (16, 0.4), (64, 0.05)])
def test_the_cache_knows_exactly(seq_len: int, share: float, tmp_path: Path) -> None:
    config = DataConfig(
        source="synthetic", synthetic=SyntheticConfig(bytes=40_000), seq_len=seq_len, validation_share=share
    )
    name = fingerprint(config)
    before = supply(config, name, tmp_path)
    b = Batches(prepare(config, tmp_path), seq_len, 1, 0, share, 1)
    assert supply(config, name, tmp_path) == Supply(b.training_tokens, exact=True)
    assert before is not None and not before.exact and before.tokens >= b.training_tokens
    assert supply(config, name, None) == before


@given(tokens=st.integers(0, 5000), seq_len=st.integers(1, 40), share=st.floats(0.01, 0.95))
def test_windows_are_those_of_the_batches(tokens: int, seq_len: int, share: float) -> None:
    try:
        expected = Batches(corpus(tokens, 1), seq_len, 1, 0, share, 1).training_windows
    except DataError:
        expected = 0
    assert training_windows(tokens, seq_len, share) == expected
