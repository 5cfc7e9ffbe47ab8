"""Sources of text: the documents of each, its fingerprint, and whether it can be used.

    pysrc       the Python standard library's source text (the default: real text without a download)
    synthetic   made from integers; knobs data.synthetic.*
    text        a .txt file, or a folder of them; one document per file
    jsonl       {"text": ...} per line, also .gz .zst .zstd; a file or a folder
    parquet     one text column; a file or a folder
    lingua      a folder of Lingua's *.chunk.*.jsonl: every chunk, in order
    examples    prompts with completions, rows of JSON, JSON lines or Parquet; a file or a folder
    arithmetic  prompts with completions, made from integers; arithmetic_graded: with labels too
    hf          a dataset of the Hugging Face hub, or a local folder laid out like one, streamed (needs `datasets`)
    hub_examples    prompts with completions, the rows of such a dataset

The order of the documents is fixed (files by name, rows as stored), so a fingerprint stands for one sequence of text.

pysrc differs between Python versions (3.11.2 and 3.11.7 share 520 of 659 files) and distributions, so results on it are
compared only where the fingerprint agrees.

No dataset's own code ever runs: `datasets` 4 removed that ability, and older versions are refused. Nothing trains from
a stream: it is read once, in its order, into the token cache.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stabstudy import extras
from stabstudy.config import EXAMPLES, FORMER_NAMES, HUB, ROWS, DataConfig
from stabstudy.data import chats, files, rows, synthetic, tokenizer
from stabstudy.data.chats import Plain, Template
from stabstudy.data.examples import ARITHMETIC, Example, Reading, of_rows
from stabstudy.data.examples import VERSION as EXAMPLES_VERSION
from stabstudy.data.examples import examples as read_examples
from stabstudy.data.files import Memory
from stabstudy.data.rows import RowCount, text_or_reason
from stabstudy.settings import DataError, renamed
from stabstudy.wording import first_line

# Tests are stripped by some distributions; the rest is not the library's or is written by each machine's own build.
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
LEFT_OUT_PATTERNS = ("config-*", "_sysconfigdata*")

VERSION = 1
"""Goes into every fingerprint. Raised when a reader comes to give other text for the same files."""


def documents(config: DataConfig, count: RowCount | None = None) -> Iterator[str]:
    """The documents of a source in their fixed order, empty ones left out, at most `max_bytes` of UTF-8 of them.

    Of examples each prompt with its completion. `count` receives how many rows were read and skipped. Raises DataError:
    what is wrong, in which file and line.
    """
    for example in examples(config, count):
        yield example.prompt + example.completion


def examples(config: DataConfig, count: RowCount | None = None, template: Template | None = None) -> Iterator[Example]:
    """As `documents`, with prompt and completion apart; a text is a completion without a prompt.

    template: what writes chats; None: the local tokenizer's own where it has one, else the plain one.
    """
    if template is None:
        template = (tokenizer.own_template(config.tokenizer) if config.source in ROWS else None) or Plain()
    count = RowCount(config.bad_rows) if count is None else count
    left, is_there = config.max_bytes, False
    for example in _everything(config, count, template):
        if left is not None:
            left -= len((example.prompt + example.completion).encode())
            if left < 0:
                break
        is_there = True
        yield example
    count.finish()
    if not is_there:
        raise _nothing(config)


def fingerprint(config: DataConfig, memory: Memory | None = None) -> str:
    """16 hex digits of what the tokens depend on: the text, wherever it lies, and the files of a local tokenizer.

    Two configs of one fingerprint give the same tokens. seq_len and validation_share only cut them, and are not in it.
    Hashes content (see `files.digest`), so callers with many trials do it once per distinct DataConfig. With a `memory`
    an edit is seen that the samples of a large file miss.
    Raises DataError where the source or the tokenizer cannot be found.
    """
    body = {
        "version": VERSION,
        "source": config.source,
        "content": _identity(config, memory),
        "max_bytes": config.max_bytes,
        "bad_rows": config.bad_rows,
        "tokenizer": tokenizer.identity(config.tokenizer),
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def packages(config: DataConfig) -> set[str]:
    """The optional packages that reading and tokenizing the text takes. Raises DataError for a tokenizer not there."""
    return tokenizer.packages(config.tokenizer) | ({"datasets"} if config.source in HUB else set())


def check(config: DataConfig) -> None:
    """Raises DataError for what can be known without reading everything; reaches no network and trains nothing.

    The path and its links, the footer and columns of every Parquet file, the first document, the tokenizer's files.
    Damage further in is found when the token cache is built (`tokens.prepare`), before the first step.
    """
    tokenizer.identity(config.tokenizer)
    if config.source in HUB:
        return
    if config.source == "synthetic" and config.max_bytes is None:
        return  # always has text, and making the first of it takes half a second
    if config.source == "parquet":
        for file in files.find(config):
            rows.check_parquet(file, config.text_column)
    next(documents(config))


def _everything(config: DataConfig, count: RowCount, template: Template) -> Iterator[Example]:
    if config.source == "hub_examples":
        yield from of_rows(hub_rows(config), Reading(config.labels, template), count)
    elif config.source in EXAMPLES:
        yield from read_examples(config, count, template)
    else:
        for text in filter(None, _texts(config, count)):
            yield Example("", text)


def _texts(config: DataConfig, count: RowCount) -> Iterator[str]:
    match config.source:
        case "pysrc":
            yield from python_documents()
        case "synthetic":
            yield from synthetic.documents(config.synthetic)
        case "hf":
            yield from hub_documents(config, count)
        case _:
            for file in files.find(config):
                yield from rows.texts(config, file, count)


def _identity(config: DataConfig, memory: Memory | None) -> dict[str, Any]:
    match config.source:
        case "pysrc":
            return {"content": python_digest()}
        case "synthetic":
            knobs = {f"data.synthetic.{name}": value for name, value in asdict(config.synthetic).items()}
            former = {name.removeprefix("data."): value for name, value in renamed(knobs, FORMER_NAMES).items()}
            return former | {"generator": synthetic.VERSION}
        case "hf":
            return hub_identity(config, memory)
        case "arithmetic" | "arithmetic_graded":
            return {"generator": EXAMPLES_VERSION, "number": ARITHMETIC}
        case "examples":
            return {"content": _digest(config, memory), "template": EXAMPLES_VERSION} | _reading(config)
        case "hub_examples":
            return hub_identity(config, memory) | {"template": EXAMPLES_VERSION} | _reading(config)
        case "jsonl" | "parquet":
            return {"content": _digest(config, memory), "column": config.text_column}
        case _:
            return {"content": _digest(config, memory)}


def _reading(config: DataConfig) -> dict[str, Any]:
    """What rows are read by beside the usual; nothing where that is all, as it was before there was anything else."""
    local = [] if config.source in HUB else files.find(config)
    described = {file.name: chats.entry(file) for file in local}
    parts = {
        "labels": config.labels,
        "info": {name: entry for name, entry in described.items() if entry is not None},
        "chat_template": tokenizer.template_identity(config.tokenizer),
    }
    return {name: part for name, part in parts.items() if part}


def _digest(config: DataConfig, memory: Memory | None) -> str:
    return files.digest(files.find(config), memory, config.max_bytes is not None)


def _nothing(config: DataConfig) -> DataError:
    if config.max_bytes is not None:
        return DataError("data.max_bytes", "must hold the source's first document", str(config.max_bytes))
    return DataError("data.path", "holds no text", repr(config.path))


def python_documents() -> Iterator[str]:
    """One document per module, by relative path. Raises DataError where the interpreter has no source files."""
    for _, path in python_modules():
        yield path.read_text(encoding="utf-8", errors="replace")


def python_digest() -> str:
    """sha256 of the Python version and of every module's relative path and content."""
    total = hashlib.sha256(platform.python_version().encode())
    for name, path in python_modules():
        now = path.stat()
        total.update(json.dumps([name, _sha256(path, now.st_size, now.st_mtime_ns)]).encode())
    return total.hexdigest()


@functools.cache
def _sha256(path: Path, size: int, changed: int) -> str:
    """Of a module that has this size and was changed then: a process plans, trains and reports on the same ones."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def python_modules() -> list[tuple[str, Path]]:
    """(relative path with slashes, path) of every module, sorted. Raises DataError if there is none."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _left_out(name)]
        paths = (Path(folder, name) for name in names if name.endswith(".py") and not _left_out(name))
        modules += [(path.relative_to(root).as_posix(), path) for path in paths]
    if not modules:
        rule = f"pysrc needs the standard library's source files, and this Python has none in {root} (zipped?)"
        raise DataError("data.source", f"{rule}: choose other data, e.g. data=synthetic", "pysrc")
    return sorted(modules)


def _left_out(name: str) -> bool:
    return name in LEFT_OUT or any(fnmatch(name, pattern) for pattern in LEFT_OUT_PATTERNS)


def hub_documents(config: DataConfig, count: RowCount) -> Iterator[str]:
    """The rows' text in the dataset's order. Raises DataError naming dataset and row."""
    for where, row, _ in hub_rows(config):
        count.rows += 1
        text, reason = text_or_reason(row, (config.text_column,))
        if reason:
            count.skip(where, reason)
        else:
            yield text


def hub_rows(config: DataConfig) -> Iterator[tuple[str, Any, str]]:
    """(place, row, "") of each row in the dataset's order. Raises DataError naming the dataset."""
    check_hub(config)
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(_rows(config), start=1):
            yield f"{config.path}: row {number}", row, ""
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError("data.path", _explained(error), str(config.path)) from error


def hub_identity(config: DataConfig, memory: Memory | None = None) -> dict[str, Any]:
    """What the dataset is: a local folder's content, else repository, configuration, split, revision and column."""
    named = {"config": config.hub_config, "split": config.hub_split, "column": config.text_column}
    root = Path(config.path or "").expanduser()
    if root.is_dir():
        content = files.digest(files.walk(root, lambda path: True), memory, config.max_bytes is not None)
        return named | {"content": content}
    return named | {"repo": config.path, "revision": config.hub_revision}


def check_hub(config: DataConfig) -> None:
    """Raises DataError if `datasets` is missing or could run a dataset's code. Reaches no network."""
    if reasons := extras.why_not(["datasets"]):
        raise DataError(
            "data.source",
            f"{reasons[0]} (older ones can run a dataset's own code; a local copy goes by source parquet or jsonl)",
            "hf",
        )


def _rows(config: DataConfig) -> Iterator[Any]:
    import datasets

    is_local = Path(config.path or "").expanduser().exists()
    if not is_local and not tokenizer.hub_forbidden() and (absent := tokenizer.why_no_hub()):
        rule = (
            f"is not here, and the hub cannot be reached ({absent}); HF_HUB_OFFLINE=1 reads what was downloaded before"
        )
        raise DataError("data.path", rule, str(config.path))
    stream = datasets.load_dataset(
        str(Path(config.path or "").expanduser()),
        name=config.hub_config,
        split=config.hub_split,
        revision=config.hub_revision,
        streaming=True,
    )
    if config.source == "hf" and stream.column_names and config.text_column not in stream.column_names:
        names = ", ".join(stream.column_names)
        raise DataError("data.text_column", f"{config.path} has only the columns {names}", config.text_column)
    yield from stream


def _explained(error: Exception) -> str:
    message = first_line(error)
    if "script" in message.lower():
        return f"wants to run code of its own, which is never run ({message})"
    return f"cannot be read as a dataset ({type(error).__name__}: {message})"
