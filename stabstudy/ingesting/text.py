"""Rows of text logs: lines of `key: value`, `key=value` or `key value` with known names, as trainers print them.

Colour codes, times, levels and the rest of a prefix are ignored. The values of one step may stand on the indented
lines below it (OLMo, Composer). What is said of an evaluation is no row. A key comes out as it is written, a value as
a number that `float` takes; a rank in the prefix is the key `rank`, the second number of `10/500` is `max_steps`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stabstudy.ingesting import several
from stabstudy.ingesting.aliases import NOT, place, plain
from stabstudy.ingesting.points import LogError, Raw
from stabstudy.ingesting.readers import open_log

SUFFIXES = (".log", ".txt", ".out", ".err", ".stdout", ".stderr")
LONGEST = 4_000
"""Characters of a line that are looked at."""
EXAMINED, FEWEST, DENSITY = 3_000, 3, 0.05
"""For `is_log`: lines looked at, rows that it needs, and their share of the lines from the first of them on."""

_KINDS = ("step", "loss", "grad_norm", "lr")
_WORD = r"[A-Za-z_][\w./%#+-]{0,60}"
_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
_NOT_FINITE = r"(?i:nan(?:\([a-z]*\))?|inf(?:inity)?|1\.#(?:IND|QNAN|SNAN|INF)0*)"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|#033\[[0-9;]*m")
_RANK = re.compile(
    r"\s*(?:\[(?:rank|default) ?(\d+)\]:?|\(rank:? ?(\d+)\)|rank ?(\d+):|\[\d+,(\d+)\]<\w+>:|(?P<label>\d{1,5}):(?= ))",
    re.IGNORECASE,
)
_RANK_WITHIN = re.compile(r"\[rank[ :=-]?(\d+)(?:/\d+)?\]", re.IGNORECASE)
_BAR = re.compile(r"(?<![\d/.])(\d+)\s*/\s*(\d+)\s*\[\d+:\d\d")  # tqdm: 10/500 [00:10<...
_BARE = re.compile(rf"\s*(\d+) train ([-+]?(?:{_NOT_FINITE}|{_NUMBER}))\s*")  # build-nanogpt's log.txt
_EVALUATION = re.compile(
    r"(?<![\w/.-])(?:eval|evaluat\w*|val|valid|validat\w*|test|testing|dev)(?![\w/.-])", re.IGNORECASE
)
_BULLETS = " \t\u2022*-"
_OTHER = frozenset(
    (
        *("number", "num", "no", "count", "total", "max", "maximum", "min", "minimum", "of", "per", "nan", "skipped"),
        *("every", "each", "first", "last", "best", "next", "previous", "remaining", "left", "warmup"),
        *("elapsed", "time"),
        *("eval", "evaluation", "val", "valid", "validation", "test", "dev", "save", "saving", "log", "logging"),
        *("update", "param", "params", "weight", "scale", "layer", "critic", "z", "aux", "router", "balancing"),
        *("running", "accumulation", "micro"),
    )
)
"""Words before a known name that make it another quantity."""

_PAIR = re.compile(
    rf"(?<![\w./-])['\"]?(?P<key>{_WORD}(?: (?:{_WORD}|\([^()]{{0,20}}\))){{0,5}})['\"\]]?"
    r"(?P<sign>\s*[:=]\s*|\s+|(?=\[))['\"]?(?:\[|(?:tensor|[Aa]rray|(?:np\.)?float\d*)\(\[?)?\s*"
    rf"(?P<value>[-+]?(?:{_NOT_FINITE}|{_NUMBER}))(?P<unit>[KMBT])?(?!%\|)%?"
    r"(?:\s*/\s*(?P<of>\d+(?:\.\d+)?))?(?!\w|\.\d|[-:/]\d)"
)
_DIGIT = re.compile(r"\d")
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}  # nanotron's human_format


@dataclass(frozen=True)
class Line:
    """One line: the rank in its prefix, the text after it, and its pairs. An evaluation's line has none."""

    rank: str | None
    text: str
    pairs: dict[str, str]

    @property
    def kinds(self) -> set[str]:
        return {ours for key in self.pairs if (ours := _kind(key)) is not None}

    @property
    def is_below(self) -> bool:
        """Whether it stands below the line of its step: indented or with a bullet, and no step beside other values."""
        return self.text[:1] in _BULLETS and ("step" not in self.kinds or len(self.pairs) == 1)


def rows(path: Path) -> Iterator[dict[str, str]]:
    """Every row with a loss or a gradient norm, in the order of the file. Raises OSError.

    A row without a step of its own gets the place of the progress bar that is drawn right after it, as `progress`;
    it has no step where no bar follows.
    """
    with open_log(path) as f:
        yield from _rows(_lines(f))


def is_named(path: Path) -> bool:
    """Whether a file may be a text log by its name, also as `.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES)


def read(path: Path, given: Mapping[str, str]) -> list[Raw]:
    """The runs in a text log. `given`: ours -> the log's name, for those that are not known by their names."""
    if not (logged := list(rows(path))):
        raise LogError("has no line of `name: value` pairs with a loss or gradient norm that is known by its name")
    return several.runs(Raw("text", rows=[*logged]), given)


def is_log(path: Path) -> bool:
    """Whether the beginning of a file reads as a training log: prose, code and settings do not. Raises OSError."""
    with open_log(path) as f:
        lines = list(itertools.islice(_lines(f), EXAMINED))
    logged = list(_rows(lines))
    steps = {value for row in logged for key, value in row.items() if _kind(key) == "step"}
    usual, repeats = Counter(tuple(row) for row in logged).most_common(1)[0] if logged else ((), 0)
    bare = {"loss", "lr"} <= {_kind(key) for key in usual}  # transformers' lines, which have no step
    if repeats < FEWEST or (len(steps) < FEWEST and (steps or not bare)):
        return False
    first = next(i for i, line in enumerate(lines) if _parse(line).kinds & {"loss", "grad_norm"})
    return len(logged) >= DENSITY * sum(line[:1].strip() != "" for line in lines[first:])


def _rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    row: dict[str, str] = {}  # of the last step, while lines below it may still add to it
    for line in map(_parse, lines):
        bar = _BAR.search(line.text)
        if bar and not line.kinds:
            if row and not _has_step(row):
                row |= {"progress": bar[1], "max_steps": bar[2]}
            yield from _whole(row)
            row = {}
        elif line.is_below and _has_step(row):
            row |= {key: value for key, value in line.pairs.items() if key not in row}
        elif line.pairs or _EVALUATION.search(line.text):
            place = {"progress": bar[1], "max_steps": bar[2]} if bar and not _has_step(line.pairs) else {}
            if not place or row.get("progress") != place["progress"]:  # a bar is drawn again with what is known later
                yield from _whole(row)
            row = line.pairs | ({"rank": line.rank} if line.rank else {}) | place
    yield from _whole(row)


def _whole(row: dict[str, str]) -> Iterator[dict[str, str]]:
    """The row, where it is one: it has a loss or a norm, and is not the summary of a whole run."""
    if _lost_loss(row):
        row = row | {"lm loss": "nan"}
    kinds = {_kind(key) for key in row}
    if kinds & {"loss", "grad_norm"} and not any("runtime" in key or "samples_per_second" in key for key in row):
        yield row


def _lost_loss(row: dict[str, str]) -> bool:
    """Whether Megatron left the loss out because it was not finite: it prints none below or beside 0."""
    if "number of nan iterations" not in row or any(_kind(key) == "loss" for key in row):
        return False
    return row["number of nan iterations"] != "0" or row.get("number of skipped iterations") == "0"


def _has_step(row: dict[str, str]) -> bool:
    return any(_kind(key) == "step" for key in row)


def _parse(line: str) -> Line:
    text = _ESCAPES.sub("", line).replace("(train)", "").replace("\uff1a", ":")  # mmengine's `Iter(train)`
    if bare := _BARE.fullmatch(text):
        return Line(None, text, {"step": bare[1], "train loss": _number(bare[2], None)})
    rank = label = None
    while match := _RANK.match(text):
        label = match["label"]
        rank, text = next(g for g in match.groups() if g is not None), text[match.end() :]
    if rank is None and (match := _RANK_WITHIN.search(text)):
        rank = match[1]
    pairs = _pairs(text)
    if label and not _has_step(pairs):
        rank = None  # `10: loss 2.3` counts something, and does not name a process
    return Line(rank, text, {} if _is_evaluation(text, pairs) else pairs)


def _pairs(text: str) -> dict[str, str]:
    """The pairs of a line; those without a colon or equals sign only where the name is known."""
    pairs: dict[str, str] = {}
    if not _DIGIT.search(text) and "nan" not in text:
        return pairs
    for match in _PAIR.finditer(text):
        name = _name(match["key"])
        kind = _kind(name)
        if not match["sign"].strip() and kind is None:
            continue
        pairs.setdefault(name, _number(match["value"], match["unit"]))
        if kind == "step" and (match["of"] or "").isdigit():
            pairs.setdefault("max_steps", match["of"])
    return pairs


def _is_evaluation(text: str, pairs: dict[str, str]) -> bool:
    """Whether a line tells of an evaluation: it says so before its loss, or has just the two means of nanoGPT's."""
    if (match := _EVALUATION.search(text)) is None:
        return False
    kinds = {_kind(key): key for key in pairs}
    if (loss := kinds.get("loss")) is None or match.start() < text.find(loss):
        return True
    return loss.lower() == "train loss" and not kinds.keys() & {"grad_norm", "lr"}


@functools.lru_cache(maxsize=4096)
def _kind(name: str) -> str | None:
    """What a name is known as."""
    places = ((at, ours) for ours in _KINDS if (at := place(ours, name)) is not None)
    return min(places, default=(0, None))[1]


@functools.lru_cache(maxsize=4096)
def _name(phrase: str) -> str:
    """The known name at the end of a phrase (`INFO root step` is `step`), else the phrase itself."""
    words = phrase.split(" ")
    for i in range(len(words)):
        name = " ".join(words[i:])
        if (ours := _kind(name)) is not None and (i == 0 or len(name) > 2 or ours == "lr"):
            others = {plain(word) for word in words[:i]} & _OTHER
            return phrase if others or (i and any(re.fullmatch(e, plain(phrase)) for e in NOT[ours])) else name
    return phrase


def _number(text: str, unit: str | None) -> str:
    text = text.replace(",", "").lower()
    if "nan" in text or "#ind" in text or "#qnan" in text or "#snan" in text:
        return "nan"
    if "inf" in text:
        return "-inf" if text.startswith("-") else "inf"
    return repr(float(text) * _UNITS[unit]) if unit else text


def _lines(f: BinaryIO) -> Iterator[str]:
    """Lines of a text file, also those that a carriage return ends."""
    magic = f.read(2)
    f.seek(0)
    encoding = "utf-16" if magic in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with io.TextIOWrapper(f, encoding=encoding, errors="replace") as text, contextlib.suppress(UnicodeError):
        while line := text.readline(2**20):
            yield from line.rstrip("\n")[:LONGEST].replace("]{", "]\n{").split("\n")  # a bar, and then a row
