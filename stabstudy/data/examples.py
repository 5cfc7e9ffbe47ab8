"""Examples for fine-tuning: prompts with their completions, read from rows of files or made from integers.

A row has one of these forms; other keys of it are passed over:

    {"prompt": "...", "completion": "..."}                            text, taken as it is
    {"prompt": [turn, ...], "completion": [turn]}                     turns of a chat, {"role": ..., "content": ...}
    {"messages": [turn, ..., turn]}                                   the last turn, an assistant's, is the completion
    {"conversations": [{"from": "human", "value": "..."}, ...]}       LLaMA-Factory's sharegpt form; `system` too

or that which a dataset_info.json beside the file describes (`chats`, where the templates of chats are too). With
`data.labels` each of them has a `label`, or `kto_tag`: true (or 1) where the completion is wanted, false (or 0) where
it is to be avoided. A pair is two examples, the chosen one first:

    {"prompt": "...", "chosen": "...", "rejected": "..."}             text, or turns as above
    {"chosen": [turn, ..., turn], "rejected": [turn, ..., turn]}      two chats, each with its own prompt
    {"conversations": [turn, ...], "chosen": turn, "rejected": turn}  LLaMA-Factory's; `messages` too

Nothing is dropped silently: a row of another form, without a label or with an empty completion is unusable
(`rows.RowCount`). The generated source, `arithmetic`, asks for sums and differences of two numbers; `arithmetic_graded`
asks the same and labels the answers, about half of which are wrong; both are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stabstudy.config import LABELLED, DataConfig
from stabstudy.data import chats, files, rows
from stabstudy.data.chats import ASSISTANT, Names, Plain, Template, Turn
from stabstudy.data.counter import draws, key_of
from stabstudy.data.files import DataFile, cause
from stabstudy.data.rows import RowCount
from stabstudy.settings import DataError
from stabstudy.wording import first_line

VERSION = 1
"""Goes into the fingerprint. Raised by any change of the plain template, or of what the generated sources ask."""

FORMS = "'prompt' and 'completion', 'messages' or 'conversations'"
ARITHMETIC = 20_000  # examples
PARQUET = (".parquet", ".parq", ".pq")


@dataclass(frozen=True)
class Example:
    """A prompt, which may be empty, and what is to follow it."""

    prompt: str
    completion: str
    label: bool | None = None  # whether this completion is a wanted one; None: of data without labels
    is_own: bool = False  # written by the tokenizer's own template, see `chats.Template`


@dataclass(frozen=True)
class Reading:
    """How rows become examples."""

    labels: bool = False
    template: Template = Plain()
    names: Names = Names()


def examples(config: DataConfig, count: RowCount, template: Template) -> Iterator[Example]:
    """The examples of a source that is not the hub, in their fixed order. Raises DataError with file and row."""
    if config.source != "examples":
        yield from arithmetic(ARITHMETIC, graded=config.source in LABELLED)
        return
    for file in files.find(config):
        how = Reading(config.labels, template, chats.names(file))
        try:
            yield from of_rows(_parquet(file) if file.name.lower().endswith(PARQUET) else _json(file), how, count)
        except OSError as error:
            raise DataError("data.path", f"{file.path}: cannot be read: {cause(error)}") from error


def of_rows(placed: Iterable[tuple[str, Any, str]], how: Reading, count: RowCount) -> Iterator[Example]:
    """The examples of rows: (place, row, why it is unreadable). Counts them; raises DataError with the place."""
    for where, row, reason in placed:
        count.rows += 1
        read, why = ([], reason) if reason else examples_or_reason(row, how)
        if why:
            count.skip(where, why)
        yield from read


def examples_or_reason(row: Any, how: Reading) -> tuple[list[Example], str]:
    """The examples of a row and ''; or none and why there is none."""
    try:
        return _examples(row, how), ""
    except ValueError as error:
        return [], str(error)


def arithmetic(number: int, graded: bool = False) -> Iterator[Example]:
    """Sums and differences of two numbers of one to three digits, in words and figures of unequal lengths.

    graded: with labels, and a wrong result where the label is False.
    """
    for draw in draws(np.uint64(key_of(*b"arithmetic")), np.arange(number, dtype=np.uint64)).tolist():
        a, b = draw % 1000 >> (draw >> 10 & 3) * 2, (draw >> 20) % 1000 >> (draw >> 30 & 3) * 2
        sign, word = (("+", "plus"), ("-", "minus"))[draw >> 40 & 1]
        result = a + b if sign == "+" else a - b
        label = bool(draw >> 42 & 1) if graded else None
        if label is False:
            result = _wrong(result, draw >> 43)
        if draw >> 41 & 1:
            yield Example(f"{a}{sign}{b}=", str(result), label)
        else:
            yield Example(f"What is {a} {word} {b}? ", f"{a} {word} {b} is {result}.", label)


def _wrong(result: int, draw: int) -> int:
    """Another number: two neighbouring digits swapped, or 1 to 8 more or less."""
    digits = str(abs(result))
    if draw & 1 and len(digits) > 1 and digits[0] != digits[1]:
        swapped = int(digits[1] + digits[0] + digits[2:])
        return -swapped if result < 0 else swapped
    away = 1 + (draw >> 1 & 7)
    return result + away if draw >> 4 & 1 else result - away


def _examples(row: Any, how: Reading) -> list[Example]:
    """Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with {FORMS}, is {type(row).__name__}")
    names = how.names
    if how.labels and names.chosen in row and names.rejected in row:
        pair = ((str(names.chosen), True), (str(names.rejected), False))
        return [_checked(_of_pair(row, key, how), label, f"{key!r} is empty") for key, label in pair]
    label = _label(row, names) if how.labels else None
    return [_checked(_of_answer(row, how), label, "has an empty completion")]


def _checked(example: Example, label: bool | None, empty: str) -> Example:
    if not example.completion:
        raise ValueError(empty)
    try:
        (example.prompt + example.completion).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half a surrogate pair, which UTF-8 cannot encode") from error
    return Example(example.prompt, example.completion, label, example.is_own)


def _label(row: Mapping[str, Any], names: Names) -> bool:
    key = next((name for name in names.label if name in row), None)
    if key is None:
        pair = f"{names.chosen or 'chosen'!r} and {names.rejected or 'rejected'!r}"
        raise ValueError(f"has no label: {' or '.join(map(repr, names.label or ('kto_tag',)))}, or {pair}")
    if not isinstance(row[key], bool) and not (isinstance(row[key], int) and row[key] in (0, 1)):
        raise ValueError(f"{key!r} must be true or false, is {json.dumps(row[key], default=str)}")
    return bool(row[key])


def _of_answer(row: Mapping[str, Any], how: Reading) -> Example:
    """Of a row with one completion."""
    names = how.names
    if names.alpaca is not None:
        response = names.alpaca["response"]
        if not isinstance(answer := row.get(response or ""), str):
            raise ValueError(f"{response!r} must be text")
        return _written(how, names.conversation(row) or [], answer)
    if not names.listed and {"prompt", "completion"} <= set(row):
        return _of_prompt(row["prompt"], row["completion"], "completion", how)
    key = next((key for key in names.messages if key in row), None)
    if key is None:
        forms = FORMS if not names.listed else f"{names.messages[0]!r}"
        pairs = f" ({rows.PAIRS})" if names.chosen in row and names.rejected in row else ""
        raise ValueError(f"has no {forms}, only {', '.join(map(repr, list(row)[:8])) or 'nothing'}{pairs}")
    turns = names.conversation(row) or []
    return _written(how, turns[:-1], _answer(turns, key))


def _of_prompt(prompt: Any, completion: Any, key: str, how: Reading) -> Example:
    """Of a prompt and what stands under `key`, both text or both turns."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return Example(prompt, completion)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(f"'prompt' and {key!r} must be of one kind: both text, or both turns of a chat")
    turns = how.names.turns(completion, key)
    if len(turns) != 1:
        raise ValueError(f"{key!r} must be one turn, has {len(turns)}")
    return _written(how, how.names.turns(prompt, "prompt"), _answer(turns, key))


def _of_pair(row: Mapping[str, Any], key: str, how: Reading) -> Example:
    """The example of a pair that stands under `key`: an answer, or the whole of a chat."""
    names, value = how.names, row[key]
    if names.alpaca is not None:
        if not isinstance(value, str):
            raise ValueError(f"{key!r} must be text")
        return _written(how, names.conversation(row) or [], value)
    value = [value] if isinstance(value, dict) else value
    prompt = row.get("prompt")
    if isinstance(value, list) and len(value) > 1 and not isinstance(prompt, list):
        turns = names.turns(value, key)
        return _written(how, turns[:-1], _answer(turns, key))
    if prompt is None and isinstance(value, list) and (before := names.conversation(row)) is not None:
        return _written(how, before, _answer(names.turns(value, key), key))
    if prompt is None:
        raise ValueError(f"has {key!r} without 'prompt', 'messages' or 'conversations'")
    return _of_prompt(prompt, value, key, how)


def _written(how: Reading, turns: list[Turn], answer: str) -> Example:
    return Example(*how.template(turns, answer), is_own=how.template.is_own)


def _answer(turns: list[Turn], key: str) -> str:
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
                yield f"{file.path}:{number}", json.loads(line.decode()), ""
            except (ValueError, RecursionError) as error:
                yield f"{file.path}:{number}", None, f"must be one JSON object per line ({first_line(error)})"


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
        yield f"{file.path}: row {number}", row, ""


def _parquet(file: DataFile) -> Iterator[tuple[str, Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.path}: row {number}", row, ""
    except (pa.ArrowException, OSError) as error:
        where = f"{file.path}: truncated or damaged after row {number}, or not a Parquet file ({file.size} bytes)"
        raise DataError("data.path", f"{where}: {first_line(error)}") from error
