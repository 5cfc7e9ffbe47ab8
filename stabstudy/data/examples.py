"""Examples for fine-tuning: prompts with their completions, read from rows of files or made from integers.

A row has one of these forms; other keys of it are passed over:

    {"prompt": "...", "completion": "..."}                            text, taken as it is
    {"prompt": [turn, ...], "completion": [turn]}                     turns of a chat, {"role": ..., "content": ...}
    {"messages": [turn, ..., turn]}                                   the last turn, an assistant's, is the completion
    {"conversations": [{"from": "human", "value": "..."}, ...]}       LLaMA-Factory's sharegpt form; `system` too

The chat template is a plain one: each turn is its role, a colon, a space, its content and an empty line; the prompt
ends with what introduces the answer, `assistant: `, and the completion is the answer's content alone.

Nothing is dropped silently: a row of another form, or with an empty completion, is unusable (`rows.RowCount`). The
generated source, `arithmetic`, asks for sums and differences of two numbers; the same examples everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabstudy.config import DataConfig
from stabstudy.data import files, rows
from stabstudy.data.counter import draws, key_of
from stabstudy.data.files import DataFile, cause
from stabstudy.data.rows import RowCount
from stabstudy.settings import DataError
from stabstudy.wording import first_line

VERSION = 1
"""Goes into the fingerprint. Raised by any change of the template, or of what the generated source asks."""

ASSISTANT = "assistant"
ROLES = {"human": "user", "gpt": ASSISTANT}
"""Names of roles in the sharegpt form -> ours; any other role keeps its name."""

FORMS = "'prompt' and 'completion', 'messages' or 'conversations'"
ARITHMETIC = 20_000  # examples
PARQUET = (".parquet", ".parq", ".pq")


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and what is to follow it."""

    prompt: str
    completion: str


def examples(config: DataConfig, count: RowCount) -> Iterator[Example]:
    """The examples of a source in their fixed order. Raises DataError with file and row."""
    if config.source == "arithmetic":
        yield from arithmetic(ARITHMETIC)
        return
    for file in files.find(config):
        try:
            for where, row, reason in _parquet(file) if file.name.lower().endswith(PARQUET) else _json(file):
                count.rows += 1
                example, why = (None, reason) if reason else example_or_reason(row)
                if example is None:
                    count.skip(f"{file.path}{where}", why)
                else:
                    yield example
        except OSError as error:
            raise DataError("data.path", f"{file.path}: cannot be read: {cause(error)}") from error


def example_or_reason(row: Any) -> tuple[Example | None, str]:
    """The example of a row and ''; or None and why there is none."""
    try:
        return _example(row), ""
    except ValueError as error:
        return None, str(error)


def arithmetic(number: int) -> Iterator[Example]:
    """Sums and differences of two numbers of one to three digits, in words and figures of unequal lengths."""
    for draw in draws(np.uint64(key_of(*b"arithmetic")), np.arange(number, dtype=np.uint64)).tolist():
        a, b = draw % 1000 >> (draw >> 10 & 3) * 2, (draw >> 20) % 1000 >> (draw >> 30 & 3) * 2
        sign, word = (("+", "plus"), ("-", "minus"))[draw >> 40 & 1]
        result = a + b if sign == "+" else a - b
        if draw >> 41 & 1:
            yield Example(f"{a}{sign}{b}=", str(result))
        else:
            yield Example(f"What is {a} {word} {b}? ", f"{a} {word} {b} is {result}.")


def _example(row: Any) -> Example:
    """Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with {FORMS}, is {type(row).__name__}")
    if {"prompt", "completion"} <= set(row):
        example = _of_pair(row["prompt"], row["completion"])
    elif (key := next((k for k in ("messages", "conversations") if k in row), None)) is not None:
        turns = _system(row) + _turns(row[key], key)
        example = Example(_templated(turns[:-1]), _answer(turns, key))
    else:
        raise ValueError(f"has no {FORMS}, only {', '.join(map(repr, list(row)[:8])) or 'nothing'}")
    if not example.completion:
        raise ValueError("has an empty completion")
    try:
        (example.prompt + example.completion).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair, which UTF-8 cannot encode") from error
    return example


def _system(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The turn of a sharegpt row's own key `system`, if it has one."""
    text = row.get("system") if "conversations" in row else None
    return [("system", text)] if isinstance(text, str) and text else []


def _of_pair(prompt: Any, completion: Any) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("'prompt' and 'completion' must be of one kind: both text, or both turns of a chat")
    turns = _turns(completion, "completion")
    if len(turns) != 1:
        raise ValueError(f"'completion' must be one turn, has {len(turns)}")
    return Example(_templated(_turns(prompt, "prompt")), _answer(turns, "completion"))


def _turns(written: Any, key: str) -> list[tuple[str, str]]:
    """(role, content) of each turn."""
    if not isinstance(written, list) or not written:
        raise ValueError(f"{key!r} must be a list of turns")
    turns = []
    for turn in written:
        named = turn if isinstance(turn, dict) else {}
        role, content = named.get("role", named.get("from")), named.get("content", named.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a turn of {key!r} must have 'role' and 'content' (or 'from' and 'value') that are text")
        turns.append((ROLES.get(role, role), content))
    return turns


def _templated(turns: list[tuple[str, str]]) -> str:
    return "".join(f"{role}: {content}\n\n" for role, content in turns) + f"{ASSISTANT}: "


def _answer(turns: list[tuple[str, str]], key: str) -> str:
    role, content = turns[-1]
    if role != ASSISTANT:
        raise ValueError(f"{key!r} must end with a turn of the assistant, ends with one of {role!r}")
    return content


def _json(file: DataFile) -> Iterator[tuple[str, Any, str]]:
    """(place, row, why it is unreadable) of each row of a JSON array, which is held whole, or of JSON lines."""
    if _content(file, whole=False).lstrip().startswith(b"["):
        yield from _array(file)
        return
    for number, line in enumerate(rows.lines(file), start=1):
        if line.strip():
            try:
                yield f":{number}", json.loads(line.decode()), ""
            except (ValueError, RecursionError) as error:
                yield f":{number}", None, f"must be one JSON object per line ({first_line(error)})"


def _content(file: DataFile, whole: bool) -> bytes:
    """All of a plain or compressed file, or its first block."""
    with file.path.open("rb") as f:
        blocks = rows.unpacked(f, file)
        return (b"".join(blocks) if whole else next(blocks, b"")).removeprefix(rows.BOM)


def _array(file: DataFile) -> Iterator[tuple[str, Any, str]]:
    try:
        values = json.loads(_content(file, whole=True).decode())
    except (ValueError, RecursionError) as error:
        raise DataError("data.path", f"{file.path}: must be a JSON array of rows ({first_line(error)})") from error
    for number, row in enumerate(values, start=1):
        yield f": row {number}", row, ""


def _parquet(file: DataFile) -> Iterator[tuple[str, Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f": row {number}", row, ""
    except (pa.ArrowException, OSError) as error:
        where = f"{file.path}: truncated or damaged after row {number}, or not a Parquet file ({file.size} bytes)"
        raise DataError("data.path", f"{where}: {first_line(error)}") from error
