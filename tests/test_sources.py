"""Every source reads what it should, in order and whole, and refuses what it should, naming file and line."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from omegaconf import OmegaConf

from stabstudy import extras
from stabstudy.config import EXAMPLES, DataConfig, from_dict
from stabstudy.data import files, sources, synthetic
from stabstudy.data.rows import RowCount
from stabstudy.data.sources import check, documents, fingerprint
from stabstudy.settings import ConfigError, DataError, Problem

TEXTS = ["First, plain.\nTwo lines.", "Zweitens: Straße, 東京, 🚀.", "tab\there \u2028 line separator", "x" * 300_000]


def config(source: str, path: Path | str | None = None, **settings: Any) -> DataConfig:
    return DataConfig(source=source, path=None if path is None else str(path), **settings)


def read(source: str, path: Path | str | None = None, **settings: Any) -> list[str]:
    return list(documents(config(source, path, **settings)))


def refused(source: str, path: Path | str | None = None, **settings: Any) -> str:
    """The one line with which reading it all is refused."""
    with pytest.raises(DataError) as caught:
        read(source, path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def json_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


# --- the published schemas, as the real files have them

FINEWEB = pa.schema(
    [
        ("text", pa.string()),
        ("id", pa.string()),
        ("dump", pa.string()),
        ("url", pa.string()),
        ("date", pa.string()),
        ("file_path", pa.string()),
        ("language", pa.string()),
        ("language_score", pa.float64()),
        ("token_count", pa.int64()),
    ]
)
FINEWEB_EDU = pa.schema(
    [field for field in FINEWEB if field.name != "date"]
    + [pa.field("score", pa.float64()), pa.field("int_score", pa.int64())]
)


def web_row(text: str, schema: pa.Schema) -> dict[str, Any]:
    filler = {pa.string(): "CC-MAIN-2013-20", pa.float64(): 0.97, pa.int64(): 123}
    return {field.name: filler[field.type] for field in schema} | {"text": text}


def write_parquet(path: Path, texts: list[str | None], schema: pa.Schema = FINEWEB, rows_per_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([web_row(text, schema) for text in texts], schema=schema)  # type: ignore[arg-type]
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")
    return path


def dclm_row(text: str, number: int) -> dict[str, Any]:
    """A row of DCLM-Baseline; which WARC keys a row has differs from row to row."""
    metadata = {"Content-Length": "5120", "Content-Type": "application/http; msgtype=response", "WARC-Type": "response"}
    metadata |= {"WARC-Truncated": "length"} if number % 2 else {"WARC-Identified-Payload-Type": None}
    return {
        "bff_contained_ngram_count_before_dedupe": 0,
        "language_id_whole_page_fasttext": {"en": 0.93},
        "metadata": metadata,
        "previous_word_count": 220,
        "text": text,
        "url": "http://example.org/",
        "warcinfo": "robots: classic\r\nformat: WARC File Format 1.0\r\n",
        "fasttext_openhermes_reddit_eli5_vs_rw_v2_bigram_200k_train_prob": 0.04,
    }


@pytest.mark.parametrize("schema", [FINEWEB, FINEWEB_EDU], ids=["fineweb", "fineweb_edu"])
def test_fineweb_files_row_group_by_row_group(tmp_path: Path, schema: pa.Schema) -> None:
    write_parquet(tmp_path / "sample/10BT/000_00000.parquet", list(TEXTS[:3]), schema)
    write_parquet(tmp_path / "sample/10BT/001_00000.parquet", list(TEXTS[3:]), schema)
    assert read("parquet", tmp_path) == TEXTS
    assert read("parquet", tmp_path / "sample/10BT/001_00000.parquet") == TEXTS[3:]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_other_arrow_types_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"body": pa.array(TEXTS).cast(kind)}), tmp_path / "x.parquet")
    assert read("parquet", tmp_path, text_column="body") == TEXTS


def test_dclm_folders_of_compressed_lines(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    for shard, rows in (
        ("global-shard_01_of_10/local-shard_0_of_10", [0, 1]),
        ("global-shard_02_of_10/local-shard_1_of_10", [2, 3]),
    ):
        folder = tmp_path / shard
        folder.mkdir(parents=True)
        # One frame per row, as concatenated files have them.
        frames = [compress(json_lines([dclm_row(TEXTS[i], i)])) for i in rows]
        (folder / "shard_00000000_processed.jsonl.zstd").write_bytes(b"".join(frames))
    assert read("jsonl", tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
def test_datatrove_rows_in_every_compression(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text, "id": f"<urn:uuid:{i}>", "metadata": {"dump": "x"}} for i, text in enumerate(TEXTS)]
    head, tail = json_lines(rows[:2]), json_lines(rows[2:])
    pack = {"": bytes, ".gz": gzip.compress}.get(suffix, zstandard.ZstdCompressor().compress)
    path = tmp_path / f"00000.jsonl{suffix}"
    path.write_bytes(pack(head) + pack(tail))  # several gzip members, several zstd frames
    assert read("jsonl", path) == TEXTS
    assert read("jsonl", tmp_path) == TEXTS


def test_lines_end_at_newlines_only_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    body = (
        b"\xef\xbb\xbf"
        + json_lines([{"text": "a\u2028b"}]).replace(b"\n", b"\r\n")
        + b'{"text": "no newline at the end"}'
    )
    (tmp_path / "a.jsonl").write_bytes(body)
    assert read("jsonl", tmp_path / "a.jsonl") == ["a\u2028b", "no newline at the end"]


# --- Lingua


def test_lingua_reads_every_chunk_in_order_and_no_validation_file(tmp_path: Path) -> None:
    folder = tmp_path / "dclm_shuffled"
    folder.mkdir()
    for i in (3, 0, 11, 2):
        (folder / f"dclm.chunk.{i:02}.jsonl").write_bytes(
            b"\n\n" + json_lines([{"text": f"t{i}"}, {"content": f"c{i}"}]) + b"\n"
        )
    (folder / "dclm.chunk.12.jsonl").write_bytes(b"")  # small sets end with empty chunks
    (folder / "dclm.val.jsonl").write_bytes(json_lines([{"text": "held out"}]))
    (folder / "dclm.chunk.00.val.jsonl").write_bytes(json_lines([{"text": "held out"}]))
    (folder / "notes.jsonl").write_bytes(json_lines([{"text": "something else"}]))
    expected = [f"{k}{i}" for i in (0, 2, 3, 11) for k in "tc"]
    assert read("lingua", folder) == expected
    assert read("lingua", tmp_path) == expected  # the root of several sources


def test_lingua_needs_a_folder_with_chunks(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines([{"text": "a"}]))
    assert "holds no *.chunk.*.jsonl" in refused("lingua", tmp_path)
    assert "needs a folder" in refused("lingua", tmp_path / "x.jsonl")


# --- text


def test_text_is_one_document_per_file_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwith mark\r\nand CRLF")
    (tmp_path / "sub/c.txt").write_text("nested")
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden.txt").write_text("not read")
    (tmp_path / "readme.md").write_text("not read")
    assert read("text", tmp_path) == ["first\n", "with mark\r\nand CRLF", "nested"]
    assert read("text", tmp_path / "readme.md") == ["not read"]  # asked for by name


def test_real_text(shared_data: Path) -> None:
    text = read("text", shared_data / "tinyshakespeare.txt")
    assert len(text) == 1
    assert len(text[0].encode()) == (shared_data / "tinyshakespeare.txt").stat().st_size
    web = read("jsonl", shared_data / "c4_demo.jsonl")
    assert len(web) == 300
    assert web[0].startswith("Don\u2019t think you need all the bells and whistles?")


# --- pysrc


def test_pysrc_is_the_standard_library_and_nothing_installed() -> None:
    names = [name for name, _ in sources.python_modules()]
    assert names == sorted(names)
    assert {"json/decoder.py", "asyncio/events.py", "typing.py"} < set(names)
    assert not [n for n in names if "site-packages" in n or "_sysconfigdata" in n or "/tests/" in n]
    text = read("pysrc")
    assert sum(map(len, text)) > 5_000_000
    assert Path(json.decoder.__file__).read_text() in text


def test_pysrc_without_source_files_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "python311.zip", "w") as library:
        library.writestr("typing.py", "")
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path / "python311.zip"))
    for call in (check, fingerprint, lambda c: list(documents(c))):
        with pytest.raises(DataError, match="standard library's source files.*data=synthetic"):
            call(DataConfig())


def test_pysrc_is_read_once_by_a_process_and_a_changed_module_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    reads: list[str] = []
    kept = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or kept(path))
    first = sources.python_digest()
    assert sources.python_digest() == first and reads == ["a.py", "b.py"]
    (tmp_path / "b.py").write_text("b.pz")  # of the same size
    os.utime(tmp_path / "b.py", ns=(1, 1))
    assert sources.python_digest() != first and reads == ["a.py", "b.py", "b.py"]


def test_a_dry_run_of_pysrc_is_cheap_and_loads_no_heavy_library() -> None:
    program = """
import sys, time
from stabstudy.config import DataConfig
from stabstudy.data.sources import fingerprint

def seconds():
    start = time.process_time()
    fingerprint(DataConfig())
    return time.process_time() - start

print(min(seconds() for _ in range(3)))
print(sorted({"torch", "pyarrow", "transformers", "tokenizers", "datasets", "zstandard"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    seconds, loaded = out.splitlines()
    assert float(seconds) < 0.3
    assert loaded == "[]"


# --- hf, through the installed library, on local folders


def hub_folder(root: Path, rows: list[dict[str, Any]]) -> Path:
    (root / "data").mkdir(parents=True)
    (root / "data/train-00000-of-00001.jsonl").write_bytes(json_lines(rows))
    return root


def test_hf_reads_a_dataset_offline(tmp_path: Path) -> None:
    rows = [{"text": text, "meta": {"key": i}} for i, text in enumerate(TEXTS)]
    assert read("hf", hub_folder(tmp_path / "lines", rows)) == TEXTS
    write_parquet(tmp_path / "columns/data/train-00000-of-00001.parquet", list(TEXTS))
    assert read("hf", tmp_path / "columns") == TEXTS


def test_hf_passes_on_what_the_settings_name(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name, text in (("en", "english"), ("de", "deutsch")):
        (root / name).mkdir(parents=True)
        (root / name / "validation.jsonl").write_bytes(json_lines([{"body": text}]))
    splits = "".join(
        f"- config_name: {n}\n  data_files:\n  - split: validation\n    path: {n}/validation.jsonl\n"
        for n in ("en", "de")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n{splits}---\n")
    settings: dict[str, Any] = {"hub_split": "validation", "text_column": "body"}
    assert read("hf", root, hub_config="de", **settings) == ["deutsch"]
    assert "'fr'" in refused("hf", root, hub_config="fr", **settings)
    assert "train" in refused("hf", root, hub_config="en", text_column="body")
    assert "only the columns body" in refused("hf", root, hub_config="en", hub_split="validation")


def test_hf_counts_bad_rows_like_any_source(tmp_path: Path) -> None:
    root = hub_folder(tmp_path / "set", [{"text": "a"}, {"text": None}])
    assert "row 2: 'text' must be text, is null" in refused("hf", root)


def test_hf_without_a_network_is_one_line() -> None:
    assert "allenai/c4" in refused("hf", "allenai/c4", hub_config="en")


def test_hf_never_runs_a_datasets_code(tmp_path: Path) -> None:
    root = tmp_path / "evil"
    root.mkdir()
    (root / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "never run" in refused("hf", root)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, r"pip install 'stabstudy\[hf\]'"),
        ("3.6.0", r"datasets 4\.0 or newer, found 3\.6\.0 \(older ones can run"),
    ],
)
def test_hf_needs_a_library_that_cannot_run_code(
    monkeypatch: pytest.MonkeyPatch, version: str | None, said: str
) -> None:
    def installed(name: str) -> str:
        if version is None:
            raise extras.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(extras, "version", installed)
    check(config("hf", "allenai/c4"))  # a plan can be made without it
    with pytest.raises(DataError, match=said):
        next(documents(config("hf", "allenai/c4")))


# --- rows that cannot be read

BAD_ROWS = {
    "bad json": b'{"text": "cut',
    "two objects": b'{"text": "a"}{"text": "b"}',
    "no object": b'["text"]',
    "no text": b'{"body": "a"}',
    "null": b'{"text": null}',
    "a number": b'{"text": 3}',
    "a list": b'{"text": ["a"]}',
    "not UTF-8": b'{"text": "\xff"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "very deep": b"[" * 200_000,
    "very long number": b'{"n": ' + b"1" * 10_000 + b"}",
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, row: bytes) -> None:
    path = tmp_path / "x.jsonl"
    good = [{"text": str(i)} for i in range(1999)]
    path.write_bytes(json_lines(good[:1]) + b"\n" + row + b"\n" + json_lines(good[1:]))
    assert f"{path}:3: " in refused("jsonl", path)
    count = RowCount(share=0.001)
    assert len(list(documents(config("jsonl", path, bad_rows=0.001), count))) == 1999
    assert (count.rows, count.skipped) == (2000, 1)
    assert count.first.startswith(f"{path}:3: ")


def test_more_bad_rows_than_allowed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines([{"text": str(i)} for i in range(1998)] + [{}, {}]))  # 2 of 2000: just allowed
    assert len(read("jsonl", path, bad_rows=0.001)) == 1998
    path.write_bytes(json_lines([{"text": str(i)} for i in range(1997)] + [{}, {}]))
    assert "data.bad_rows" in (said := refused("jsonl", path, bad_rows=0.001))
    assert f"{path}:1998" in said and "got 2 of 1999" in said


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ["a", None, "b"])
    assert f"{path}: row 2: 'text' must be text, is null" in refused("parquet", path)
    raw = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), path)
    assert f"{path}: row 2: 'text' must be UTF-8" in refused("parquet", path)


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "latin.txt: must be UTF-8, is not at byte 3" in refused("text", tmp_path)


# --- hostile and broken files


def whole_files(folder: Path) -> dict[str, Path]:
    body = json_lines([{"text": os.urandom(300).hex()} for _ in range(200)])
    made = {
        "jsonl.gz": gzip.compress(body),
        "jsonl.zst": zstandard.ZstdCompressor().compress(body),
        "jsonl.zstd": zstandard.ZstdCompressor().compress(body) * 2,
    }
    for suffix, content in made.items():
        (folder / f"x.{suffix}").write_bytes(content)
    write_parquet(folder / "x.parquet", [os.urandom(300).hex() for _ in range(200)], rows_per_group=50)
    return {suffix: folder / f"x.{suffix}" for suffix in (*made, "parquet")}


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "jsonl.zstd", "parquet"])
def test_a_cut_file_is_never_taken_for_a_shorter_one(tmp_path: Path, suffix: str) -> None:
    path = whole_files(tmp_path)[suffix]
    source = "parquet" if suffix == "parquet" else "jsonl"
    body, expected = path.read_bytes(), len(read(source, path))
    for size in range(1, len(body), max(1, len(body) // 40)):
        path.write_bytes(body[:size])
        if suffix == "jsonl.zstd" and size == len(body) // 2:
            continue  # exactly one whole frame is a whole file
        assert str(path) in refused(source, path), size
    path.write_bytes(body)
    assert len(read(source, path)) == expected


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_flipped_bytes_never_escape_as_another_exception(tmp_path: Path, suffix: str) -> None:
    path = whole_files(tmp_path)[suffix]
    source = "parquet" if suffix == "parquet" else "jsonl"
    body = bytearray(path.read_bytes())
    for place in range(0, len(body), max(1, len(body) // 60)):
        damaged = body.copy()
        damaged[place] ^= 0x5A
        path.write_bytes(damaged)
        try:
            read(source, path)
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(json_lines([{"text": "plain"}] * 50))
    assert str(path) in refused("parquet" if suffix == "parquet" else "jsonl", path)


def test_parquet_pages_with_checksums_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"text": ["a needle in the text"]}), path, write_page_checksum=True, **plain)
    path.write_bytes(path.read_bytes().replace(b"a needle", b"a noodle", 1))
    assert "damaged after row 0" in refused("parquet", path)


def test_columns_that_are_no_text_are_refused_with_what_there_is(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", ["a"])
    assert "only the columns text, id, dump" in refused("parquet", path, text_column="content")
    assert "it is int64" in refused("parquet", path, text_column="token_count")


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/a.txt").write_text("a")
    (root / "b.txt").symlink_to("sub/a.txt")
    (root / "again").symlink_to("sub")
    assert read("text", root) == ["a", "a"]  # within: a linked file is a file, a linked folder is read where it lies
    (root / "c.txt").symlink_to("../secret.txt")
    assert "must not lead out of the folder" in refused("text", root)
    (root / "c.txt").unlink()
    (root / "elsewhere").symlink_to(tmp_path)
    assert "got elsewhere" in refused("text", root)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    assert "must exist and be readable (No such file or directory)" in refused("text", tmp_path / "missing")
    assert "must exist" in refused("jsonl", "nul\0byte")
    assert "holds no *.parquet" in refused("parquet", tmp_path)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    assert "holds no text" in refused("jsonl", tmp_path)
    (tmp_path / "a.txt").symlink_to("gone")
    assert "must exist" in refused("text", tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "needs a regular file" in refused("jsonl", tmp_path / "pipe.jsonl")
    assert "holds no text" in refused("jsonl", tmp_path)  # a pipe in a folder is no file: it would wait for ever


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("data.path", "must exist", "x")))
    assert str(error) == "data.path: must exist, got x"
    assert error.problem == Problem("data.path", "must exist", "x")


# --- max_bytes


def test_max_bytes_takes_whole_documents_and_counts_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(json_lines([{"text": t} for t in ("aaaa", "\u00fc\u00fc", "b")]))
    for limit, expected in ((4, 1), (7, 1), (8, 2), (9, 3), (100, 3)):
        assert len(read("jsonl", tmp_path, max_bytes=limit)) == expected
    assert "data.max_bytes: must hold the source's first document, got 3" in refused("jsonl", tmp_path, max_bytes=3)


# --- check: what is known before anything starts


def test_check_finds_what_can_be_known_early(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", ["x" * 1000] * 9)
    check(config("parquet", tmp_path))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="b.parquet: truncated, or not a Parquet file"):
        check(config("parquet", tmp_path))
    with pytest.raises(DataError, match="data.tokenizer: must be a file"):
        check(config("pysrc", tokenizer="./missing.json"))
    for fine in (DataConfig(), DataConfig(source="synthetic"), config("hf", "allenai/c4")):
        check(fine)


# --- the presets of conf/data

PRESETS = sorted((Path(__file__).parent.parent / "conf/data").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_whole_but_for_a_path_of_your_own(preset: Path) -> None:
    values = OmegaConf.to_container(OmegaConf.load(preset))
    assert isinstance(values, dict)
    assert preset.read_text().startswith("# ")
    hub_sets = {"c4", "fineweb", "fineweb_edu", "dclm"}
    assert (values["source"] == "hf") == (preset.stem in hub_sets) == (values.get("max_bytes") is not None)
    labelled = values.get("labels") or values["source"] == "arithmetic_graded"
    objective = {"kind": "kto" if labelled else "sft" if values["source"] in EXAMPLES else "lm"}
    if values.get("path") is None and values["source"] not in ("pysrc", "synthetic", "arithmetic", "arithmetic_graded"):
        with pytest.raises(ConfigError, match=f"^data.path: source {values['source']} needs a path, got null$"):
            from_dict({"data": values, "objective": objective})
        values["path"] = "somewhere"
    assert (from_dict({"data": values, "objective": objective}).data == DataConfig()) == (preset.stem == "pysrc")


def test_the_default_preset_spells_every_setting() -> None:
    values = OmegaConf.to_container(OmegaConf.load(next(p for p in PRESETS if p.stem == "pysrc")))
    assert values == dataclasses.asdict(DataConfig())


def test_noise_presets_turn_one_knob_each() -> None:
    clean = DataConfig(source="synthetic")
    for preset in (p for p in PRESETS if p.stem.startswith("synthetic_")):
        noisy = from_dict({"data": OmegaConf.to_container(OmegaConf.load(preset))}).data
        assert sum(a != b for a, b in zip(vars(clean).values(), vars(noisy).values(), strict=True)) == 1


# --- a JSON array


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_called_what_it_is(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"messages": [{"role": "user", "content": "hi"}], "label": True}] * 3, indent=indent))
    line = refused("jsonl", path)
    assert line == (
        f"data.path: {path}:1: a JSON array is not a JSON lines file, which has one object with its text on each line; "
        "completions with labels are read by objective=kto data=kto data.path=..., without them by objective=sft "
        "data=sft"
    )
    with pytest.raises(DataError, match="a JSON array is not a JSON lines file"):
        check(config("jsonl", path))
    assert "a JSON array" in refused("jsonl", path, bad_rows=0.001), "also where some rows may be bad"


def test_an_array_further_down_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json_lines([{"text": "a"}, ["b"]]))
    assert refused("jsonl", path) == f"data.path: {path}:2: must be an object with 'text', is list"


@pytest.mark.shareddata
def test_a_real_preference_set_is_called_what_it_is(shared_data: Path) -> None:
    assert "by objective=kto data=kto data.path=" in refused("jsonl", shared_data / "kto_en_demo.json")


# --- names that people use


@pytest.mark.parametrize("end", ["", ".gz", ".zst", ".zstd"])
@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "JSONL", "Json"])
def test_json_lines_under_the_names_people_use(tmp_path: Path, kind: str, end: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress}.get(end, zstandard.compress)
    root = tmp_path / "en"
    (root / "sub").mkdir(parents=True)
    (root / f"part-00000-of-00002.{kind}{end}").write_bytes(pack(json_lines([{"text": "a"}])))
    (root / f"sub/part-00001-of-00002.{kind}{end.upper()}").write_bytes(pack(json_lines([{"text": "b"}])))
    assert read("jsonl", root) == ["a", "b"]


def test_a_plain_json_beside_json_lines_tells_about_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([{"text": "a"}]))
    before = fingerprint(config("jsonl", tmp_path))
    (tmp_path / "dataset_info.json").write_text('{"splits": 1}\n')
    (tmp_path / "README.md").write_text("of the data")
    assert read("jsonl", tmp_path) == ["a"] and fingerprint(config("jsonl", tmp_path)) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}]', "x.json is a JSON array: JSON lines have one object on each line; data.files names"),
        (b'{\n "text": "a"\n}\n', "x.json does not begin with a line that is a JSON object"),
        (b"", "x.json does not begin"),
    ],
)
def test_a_json_that_is_no_json_lines_is_called_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(json_lines([{"text": "a"}]))
    (tmp_path / "x.json").write_bytes(content)
    assert reason in refused("jsonl", tmp_path)
    assert read("jsonl", tmp_path, files="a*.json") == ["a"]


def test_an_array_of_texts_is_told_how_to_become_lines(tmp_path: Path) -> None:
    for name, content in (("a.json", '[{"text": "a"}]'), ("b.json", '[\n {"text": "a"}\n]')):
        (tmp_path / name).write_text(content)
        line = refused("jsonl", tmp_path / name)
        assert "a JSON array is not a JSON lines file" in line and "one to a line (jq -c '.[]')" in line
        assert "chat" not in line
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'[{"messages": []}]'))
    assert "chat data are read by objective=sft" in refused("jsonl", tmp_path / "c.json.gz")
    (tmp_path / "d.json").write_text('{\n "text": "a"\n}')
    assert "one JSON document over several lines" in refused("jsonl", tmp_path / "d.json")


def test_a_compressed_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    for i, pack in enumerate((gzip.compress, zstandard.compress)):
        (tmp_path / f"{i}.jsonl").write_bytes(pack(json_lines([{"text": str(i)}])))
        (tmp_path / f"{i}.txt").write_bytes(pack(b"text"))
    assert read("jsonl", tmp_path) == ["0", "1"]
    assert read("text", tmp_path) == ["text", "text"]


TREE = ("a.rst", "B.RST", "docs/c.rst", "docs/deep/d.rst", "docs/e.md", "docs/f.txt", ".hidden/g.rst", "docs/h+.rst")


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("*.rst", ["B.RST", "a.rst", "docs/c.rst", "docs/deep/d.rst", "docs/h+.rst"]),
        ("**/*.rst", ["B.RST", "a.rst", "docs/c.rst", "docs/deep/d.rst", "docs/h+.rst"]),
        ("docs/*.rst", ["docs/c.rst", "docs/h+.rst"]),
        ("docs/**/?.rst", ["docs/c.rst", "docs/deep/d.rst"]),
        ("./docs/*.[mt]*", ["docs/e.md", "docs/f.txt"]),
        ("[!ab].rst", ["docs/c.rst", "docs/deep/d.rst"]),
        ("**", ["B.RST", "a.rst", "docs/c.rst", "docs/deep/d.rst", "docs/e.md", "docs/f.txt", "docs/h+.rst"]),
    ],
)
def test_a_glob_chooses_the_files_of_a_folder(tmp_path: Path, glob: str, names: list[str]) -> None:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read("text", tmp_path, files=glob) == names


def test_what_a_folder_holds_instead_is_said(tmp_path: Path) -> None:
    for name in ("a.md", "b.md", "c.png", "LICENSE", "d.csv.gz"):
        (tmp_path / name).write_text("x")
    (tmp_path / "gone").symlink_to("nowhere")
    line = refused("text", tmp_path)
    assert "the folder holds no *.txt; it holds 2 *.md, " in line and "(data.files names what to read)" in line
    assert "1 *.csv.gz" in line and "2 without an ending" in line
    assert "holds no file *.rst; it holds 2 *.md" in refused("text", tmp_path, files="*.rst")
    assert "the folder holds no *.jsonl, *.ndjson or *.json of one object per line" in refused("jsonl", tmp_path)
    assert "data.files: chooses among the files of a folder" in refused("text", tmp_path / "a.md", files="*.md")


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        (
            {"files": "*.md"},
            "data.files: has an effect with sources text, jsonl, parquet, examples only, got",
        ),
        ({"source": "lingua", "path": "x", "files": "*"}, "data.files: has an effect with"),
        *(
            ({"source": "text", "path": "x", "files": glob}, "data.files: must be a glob below data.path")
            for glob in ("", "/etc/*", "../*.txt", "a/../../b", "~/x")
        ),
    ],
)
def test_a_glob_without_an_effect_or_out_of_the_folder_is_refused(values: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(rule)):
        from_dict({"data": values})


# --- fingerprints


def test_a_fingerprint_does_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    for i in range(3):
        write_parquet(tmp_path / f"here/part{i}.parquet", [f"text {i}"])
    before = fingerprint(config("parquet", tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "moved/there")
    assert fingerprint(config("parquet", tmp_path / "moved/there")) == before
    assert fingerprint(config("hf", tmp_path / "here")) == fingerprint(config("hf", tmp_path / "moved/there"))
    assert len(before) == 16 and int(before, 16) >= 0


def test_a_fingerprint_changes_with_all_that_changes_the_tokens(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([{"text": "a", "body": "b"}]))
    (tmp_path / "tokenizer.json").write_text("{}")
    base = config("jsonl", tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    seen = [fingerprint(base)]
    for change in ({"max_bytes": 10}, {"text_column": "body"}, {"bad_rows": 0.001}, {"tokenizer": "bytes"}):
        seen.append(fingerprint(dataclasses.replace(base, **change)))  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    seen.append(fingerprint(base))
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"z"'))  # same size
    seen.append(fingerprint(base))
    path.rename(tmp_path / "b.jsonl")
    seen.append(fingerprint(base))
    assert len(set(seen)) == len(seen)
    assert fingerprint(dataclasses.replace(base, seq_len=7, validation_share=0.5)) == seen[-1]  # these only cut


def test_a_large_file_is_sampled_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 2 << 20)
    path = tmp_path / "big.txt"
    path.write_bytes(b"x" * (3 << 20))
    before = fingerprint(config("text", path))
    for place in (0, (3 << 20) - 1):
        with path.open("r+b") as f:
            f.seek(place)
            f.write(b"y")
        assert fingerprint(config("text", path)) != before
        path.write_bytes(b"x" * (3 << 20))
    assert fingerprint(config("text", path)) == before


def test_hub_names_are_fingerprinted_by_what_they_ask_for() -> None:
    base = config("hf", "allenai/c4", hub_config="en")
    changes: list[dict[str, Any]] = [{}, {"hub_config": "de"}, {"hub_split": "validation"}, {"hub_revision": "1588ec4"}]
    assert len({fingerprint(dataclasses.replace(base, **change)) for change in changes}) == len(changes)


def test_synthetic_is_fingerprinted_by_its_knobs_and_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    base = DataConfig(source="synthetic")
    own = base.synthetic
    knobs = [f.name for f in dataclasses.fields(own)]
    turned = [dataclasses.replace(base, synthetic=dataclasses.replace(own, **{k: getattr(own, k) + 1})) for k in knobs]
    seen = {fingerprint(c) for c in (base, *turned)}
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert len(seen | {fingerprint(base)}) == len(knobs) + 2


def test_pysrc_is_fingerprinted_by_version_names_and_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "a.py").write_text("a = 1\n")
    seen = [fingerprint(DataConfig())]
    (tmp_path / "a.py").write_text("a = 2\n")
    seen.append(fingerprint(DataConfig()))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    seen.append(fingerprint(DataConfig()))
    monkeypatch.setattr(sources.platform, "python_version", lambda: "3.99.0")
    seen.append(fingerprint(DataConfig()))
    assert len(set(seen)) == 4
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages/c.py").write_text("")
    assert fingerprint(DataConfig()) == seen[-1]


# --- memory


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    program = """
import resource, sys
from stabstudy.config import DataConfig
from stabstudy.data.sources import documents

print(sum(map(len, documents(DataConfig(source="jsonl", path=sys.argv[1])))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    block = zstandard.ZstdCompressor().compress(json_lines([{"text": "word " * 2000}] * 100))  # of 1 MB
    peaks = []
    for megabytes in (4, 64):
        path = tmp_path / f"{megabytes}.jsonl.zst"
        path.write_bytes(block * megabytes)
        out = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
        size, peak = map(int, out.split())
        assert size == megabytes * 1_000_000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 8_000  # kB, for 60 MB more text
