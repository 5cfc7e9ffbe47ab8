"""Descriptions of runs of other trainers, as the `external` block of a config.json.

Such a trial has no TrialConfig: most of its settings are unknown, and a default in their place would be false in every
table. Its config.json holds `config: null` and a block `external` instead; a setting that is not in that block is not
known. The rows of its trace are the logged steps on a regular grid: row i is step `first_step + i * stride` of the
source, and a row that the source lacks is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy.settings import Problem, nearest, read_value, renamed
from stabstudy.store import StoreError

LARGEST_STEP = 2**53


GAPS = 0.1
"""A log in which this share of the steps on its grid is missing is approximate."""


def has_gaps(missing: int, rows: int) -> bool:
    """Whether so many of a log's places have no row that no statistic may count on each of them."""
    return bool(missing) and missing >= GAPS * rows


@dataclass(frozen=True)
class Format:
    """A kind of log: its name, and what a reader of its numbers must know."""

    name: str
    meaning: str
    default_clip: tuple[float, str] | None = None  # threshold by default; the setting's name there


_TRAINER = (
    "the gradient norm is that before clipping of the last step before each log line, the loss the mean since the "
    "line before; transformers 4.x logs the learning rate of the next step"
)
_UNSAID = "whether the norm is that before clipping is not known"
FORMATS = {
    "trainer_state": Format("Hugging Face Trainer", _TRAINER, (1.0, "max_grad_norm")),
    "trainer_log": Format("LLaMA-Factory", _TRAINER, (1.0, "max_grad_norm")),
    "lingua": Format(
        "Lingua",
        "the gradient norm is that before clipping; the loss is that of the last micro-batch alone, a mean over ranks",
    ),
    "table": Format("table", f"the meaning of its columns is known from their names alone: {_UNSAID}"),
    "text": Format("text log", f"the meaning of its values is known from their names alone: {_UNSAID}"),
    "tensorboard": Format("TensorBoard", f"the meaning of its tags is known from their names alone: {_UNSAID}"),
}  # fmt: skip


@dataclass(frozen=True)
class ExternalLog:
    """The block `external` of a config.json."""

    run: str
    format: str  # a key of FORMATS
    files: Mapping[str, str]  # path as it was given -> sha256
    first_step: int
    stride: int  # steps of the source from one row to the next
    steps_planned: int | None  # by the source
    settings: Mapping[str, Any]  # by our names, known ones only; optim.clip null: known to be off
    others: Mapping[str, Any]  # under the source's names
    left_out: Mapping[str, int]  # what rows -> how many
    notes: tuple[str, ...] = ()
    moved: Mapping[str, int] = field(default_factory=dict)  # row, as text -> its step, where that is not the grid's
    after_clipping: bool = False  # whether the norms are those after clipping: no measure of the gradient

    def step_of(self, row: int) -> int:
        """The step of the source that a row of the trace is."""
        return self.moved.get(str(row), self.first_step + self.stride * row)

    def body(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


_OPTIONAL = {"moved": dict, "after_clipping": bool}
"""What older studies lack."""

_TYPES = {
    "run": str, "format": str, "files": dict, "first_step": int, "stride": int, "steps_planned": int | None,
    "settings": dict, "others": dict, "left_out": dict, "notes": list,
}  # fmt: skip


def check(name: str, value: Any) -> tuple[Any, Problem | None]:
    """The value of a setting as its rules want it, or what they refuse."""
    if name not in cfg.setting_names():
        return None, Problem(name, f"is not a setting{nearest(name, cfg.setting_names())}")
    problems: list[Problem] = []
    field = cfg.SETTINGS[name]
    checked = read_value(name, str(field.type), field.metadata, value, problems, None)
    return checked, problems[0] if problems else None


def read_external(body: Mapping[str, Any], path: Path) -> ExternalLog | None:
    """The block of a config.json; None for a trial of our own. Raises StoreError where it is none that we wrote."""
    block = body.get("external")
    if block is None:
        return None
    if not isinstance(block, dict) or not set(_TYPES) <= set(block):
        raise StoreError(f"{path}: external must hold {', '.join(_TYPES)}")
    for name, kind in _TYPES.items():
        if not isinstance(block[name], kind) or isinstance(block[name], bool):
            raise StoreError(f"{path}: external.{name} has the wrong type ({type(block[name]).__name__})")
    more = {name: block[name] for name in _OPTIONAL if name in block}
    if wrong := next((n for n, v in more.items() if not isinstance(v, _OPTIONAL[n])), None):
        raise StoreError(f"{path}: external.{wrong} has the wrong type ({type(more[wrong]).__name__})")
    moved = more.get("moved", {})
    if not all(row.isdecimal() and type(step) is int and 0 <= step <= LARGEST_STEP for row, step in moved.items()):
        raise StoreError(f"{path}: external.moved: must hold rows, and steps from 0 to 2^53")
    if block["format"] not in FORMATS:
        raise StoreError(f"{path}: external.format: unknown ({block['format']!r})")
    for name, least in (("stride", 1), ("first_step", 0), ("steps_planned", 1)):
        if block[name] is not None and not least <= block[name] <= LARGEST_STEP:
            raise StoreError(f"{path}: external.{name}: must be from {least} to 2^53")
    block = {**block, "settings": renamed(block["settings"], cfg.CURRENT_NAMES)}
    if problem := next((p for n, v in block["settings"].items() if (p := check(n, v)[1])), None):
        raise StoreError(f"{path}: external.settings: {problem}")
    if not all(isinstance(v, bool | int | float | str) for v in block["others"].values()):
        raise StoreError(f"{path}: external.others: must hold single values")
    return ExternalLog(**{name: block[name] for name in _TYPES} | {"notes": tuple(block["notes"])} | more)
