"""The record of a trial: its columns, and its rows in memory.

Two tables share one mechanism. The *trace* has one row per optimizer step, no gaps, no sentinels; *probes* has one row
on each step where something costly was measured. While the trial runs, rows are blocks of binary records (`live`; of an
older study JSON lines, `encodings`). When it ends, `finished.write` makes one Parquet file of them.

Null and NaN are different answers: `clip_scale` null means "clipping was off", NaN "the norm was not finite". Every
form keeps them apart (`Rows.is_null`).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["int", "float", "text", "floats"]
SKIPS = ("amp", "nonfinite", "spike", "no_targets")
"""The policies that skip an update. Where a skip is a number, 0 is none, and policy i is i + 1."""


@dataclass(frozen=True)
class Column:
    """One column: its type (`floats`: a fixed-length list), whether null is a legal answer, unit, meaning.

    `codes`: the texts that a live record can hold, each written as its index here.
    """

    name: str
    kind: Kind
    unit: str
    meaning: str
    nullable: bool = False
    codes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schema:
    """The columns of one record. `contiguous`: steps must be 0, 1, 2, ... without gaps."""

    name: str
    columns: tuple[Column, ...]
    contiguous: bool

    @property
    def names(self) -> list[str]:
        return [c.name for c in self.columns]


TRACE = Schema(
    "trace",
    (
        Column("step", "int", "", "0-based optimizer step"),
        Column("tokens", "int", "token", "targets seen, this step included"),
        Column("seconds", "float", "s", "wall time of this step; members of a pack have it in common"),
        Column("lr", "float", "", "scheduled learning rate used by this update"),
        Column("loss", "float", "nat/token", "cross-entropy summed over all micro-batches / valid targets", True),
        Column("grad_norm", "float", "gradient", "global L2 norm BEFORE clipping, unscaled", True),
        Column("clip_scale", "float", "1", "factor applied by clipping; null: clipping off", True),
        Column(
            "layer_grad_norm", "floats", "gradient", "norm of embed, layer 0..L-1, head (with the final norm)", True
        ),
        Column("logit_absmax", "float", "nat", "largest absolute output logit on valid targets", True),
        Column("logz_mean", "float", "nat", "mean logsumexp of the output logits on valid targets", True),
        Column("loss_scale", "float", "1", "fp16 scaler value used at this step; null: no scaler", True),
        Column("skip", "text", "", f"policy that skipped the update: {' | '.join(SKIPS)}; null: none", True, SKIPS),
    ),
    contiguous=True,
)

_CLASSES = {"chosen": "wanted", "rejected": "unwanted"}
_OF_CLASS: tuple[tuple[str, Kind, str, str], ...] = (
    ("reward", "float", "1", "beta times the log-probability ratio to the reference, mean over {} completions"),
    ("logp", "float", "nat", "log-probability of a completion, sum over its tokens, mean over {} completions"),
    ("logz_mean", "float", "nat", "mean logsumexp of the output logits on tokens of {} completions"),
    ("logit_sd", "float", "nat", "mean sd of the output logits over the vocabulary on tokens of {} completions"),
    ("logit_absmax", "float", "nat", "largest absolute output logit on tokens of {} completions"),
    ("sequences", "int", "", "{} completions with a token"),
    ("targets", "int", "token", "tokens of {} completions"),
)
KTO = (
    Column("kl", "float", "nat", "KTO's z0: max(0, kl_raw) of a micro-batch, mean over sequences", True),
    Column("kl_raw", "float", "nat", "mean log-probability ratio to the reference of mismatched completions", True),
    Column("margin", "float", "1", "reward_chosen - reward_rejected", True),
    *(
        Column(f"{name}_{c}", kind, unit, meaning.format(which), kind == "float")
        for name, kind, unit, meaning in _OF_CLASS
        for c, which in _CLASSES.items()
    ),
    Column("clipped", "float", "fraction", "sequences that were cut at the context", True),
    Column("empty", "float", "fraction", "sequences without a token of a completion, which count for nothing", True),
)
"""Columns of a trial with objective `kto`, behind the usual ones. A mean over no sequence or token is null."""

TRACE_KTO = replace(TRACE, columns=(*TRACE.columns, *KTO))


def of_objective(kind: str) -> Schema:
    """The trace of a trial with this objective. Whoever reads it as TRACE gets the usual columns."""
    return TRACE_KTO if kind == "kto" else TRACE


LOG = replace(TRACE, columns=tuple(replace(c, nullable=c.name != "step") for c in TRACE.columns))
"""The trace of a run trained elsewhere: what its log lacks is null. Row i is a logged step, not step i."""

PROBES = Schema(
    "probes",
    (
        Column("step", "int", "", "state after this many updates (0: the initial weights)"),
        Column("val_loss", "float", "nat/token", "loss on the fixed set of the periodic evaluation", True),
        Column(
            "update_rms",
            "float",
            "1",
            "RMS over all elements of m_hat/(sqrt(v_hat)+eps) of the last update; null: none, or not Adam",
            True,
        ),
        Column(
            "adam_rms_max",
            "float",
            "1",
            "max over tensors of sqrt(mean(g^2/max(v_hat, eps^2))) in it; null: no update, or not Adam",
            True,
        ),
        Column("attn_logit_max", "floats", "nat", "per layer: largest unmasked q.k/sqrt(head_dim)", True),
        Column(
            "attn_entropy",
            "floats",
            "1",
            "per layer: mean attention entropy / log(positions), position 0 left out",
            True,
        ),
        Column("resid_rms", "floats", "1", "per layer: RMS of the residual stream after it", True),
        Column("param_norm", "float", "1", "L2 norm of all weights", True),
        Column(
            "noise_g2",
            "float",
            "gradient^2",
            "squared norm of the true gradient, estimated from one step's batch",
            True,
        ),
        Column(
            "noise_s", "float", "gradient^2 token", "trace of the covariance of one token's gradient, likewise", True
        ),
        Column(
            "noise_scale",
            "float",
            "token",
            "moving mean of noise_s / that of noise_g2, each keeping 0.9 per probe; "
            "all three null: one micro-batch; it alone: mean noise_g2 <= 0",
            True,
        ),
    ),
    contiguous=False,
)


def widths(depth: int) -> dict[str, int]:
    """Entries of each list of numbers in both records, for a model of `depth` layers."""
    return {"layer_grad_norm": depth + 2} | dict.fromkeys(("attn_logit_max", "attn_entropy", "resid_rms"), depth)


class DamagedRecord(Exception):
    """A record that cannot be trusted: bad rows with good rows after them, a wrong step, a wrong checksum."""


@dataclass(frozen=True, repr=False)
class Rows:
    """A record in memory: one array per column, float64 (null as NaN, see `is_null`), int64, or object for text.

    `layer_grad_norm` and the other lists have shape [rows, entries]. Columns that a file of an older version lacks
    are present and all null.
    """

    schema: Schema
    columns: Mapping[str, NDArray[Any]]
    nulls: Mapping[str, NDArray[np.bool_]]
    note: str = ""

    def __len__(self) -> int:
        return len(self.columns["step"])

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def is_null(self, name: str) -> NDArray[np.bool_]:
        """Shape [rows]: True where the column was null ("not applicable"), False for numbers and NaN."""
        return self.nulls[name]

    def has(self, name: str) -> bool:
        """Whether any row has an answer in this column."""
        return bool((~self.nulls[name]).any())

    def only(self, names: Sequence[str]) -> Rows:
        """These columns of it and the step; names that are none of its columns count for nothing."""
        kept = tuple(c for c in self.schema.columns if c.name in names or c.name == "step")
        schema = replace(self.schema, columns=kept)
        return replace(self, schema=schema, columns={n: self[n] for n in schema.names})

    def flat(self) -> dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]]:
        """Each column as its values, shape [rows], and which are null; None: of a column that has no null.

        A list is a column per entry: `layer_grad_norm_embed`, `layer_grad_norm_0` (layer 0) and so on,
        `layer_grad_norm_head`; of the others `attn_logit_max_0` and so on. One that is null in every row has none.
        """
        flat: dict[str, tuple[NDArray[Any], NDArray[np.bool_] | None]] = {}
        for column in self.schema.columns:
            values, null = self[column.name], self.nulls[column.name] if column.nullable else None
            parts = values.T if column.kind == "floats" else [values]
            names = entries(column.name, len(parts)) if column.kind == "floats" else [column.name]
            flat |= {name: (part, null) for name, part in zip(names, parts, strict=True)}
        return flat

    def frame(self) -> pd.DataFrame:
        """The record as a DataFrame, a row per step, its columns named as `flat` names them.

        A column that may be null is of pandas' type Float64 or Int64, where null is NA and a number that was not finite
        is NaN or infinite still; `isna()` is true of NA alone. Text that is null is None. Needs pandas.
        """
        import pandas as pd

        return pd.DataFrame({name: as_series(*column) for name, column in self.flat().items()}).copy()

    def __repr__(self) -> str:
        absent = [c.name for c in self.schema.columns if not self.has(c.name)]
        there = ", ".join(n for n in self.schema.names if n not in absent)
        return f"{self._title()}: {there}" + (f"; all null: {', '.join(absent)}" if absent else "")

    def _title(self) -> str:
        steps = f", step {self['step'][0]} to {self['step'][-1]}" if len(self) else ""
        return f"{self.schema.name} of {len(self)} rows{steps}{f' ({self.note})' if self.note else ''}"

    def _repr_html_(self) -> str:
        """A row per column, as a notebook shows it: unit, meaning, how many rows are null, smallest and largest."""
        cells = [("column", "unit", "meaning", "null", "min", "max"), *map(self._cells, self.schema.columns)]
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
        return f"<p>{html.escape(self._title())}</p><table><tbody>{rows}</tbody></table>"

    def _cells(self, column: Column) -> tuple[str, ...]:
        values, null = self[column.name], self.nulls[column.name]
        finite = values[~null] if column.kind != "text" else np.empty(0)
        finite = finite[np.isfinite(finite)]
        ends = (f"{finite.min():.6g}", f"{finite.max():.6g}") if finite.size else ("", "")
        return (column.name, column.unit, column.meaning, str(int(null.sum())), *ends)


def entries(column: str, count: int) -> list[str]:
    """The names of a list's entries as columns of their own; see `Rows.flat`."""
    whole = column == "layer_grad_norm" and count > 1
    names = ["embed", *range(count - 2), "head"] if whole else [*range(count)]
    return [f"{column}_{name}" for name in names]


def as_series(values: NDArray[Any], null: NDArray[np.bool_] | None) -> pd.Series[Any]:
    """Values as a pandas column that shares their memory; `null` None: of a type that has no NA. Needs pandas."""
    import pandas as pd

    if null is None or values.dtype == object:
        return pd.Series(values, dtype=values.dtype, copy=False)  # else text would become pandas' own, with NaN
    array = pd.arrays.IntegerArray if values.dtype.kind == "i" else pd.arrays.FloatingArray
    return pd.Series(array(values, null), copy=False)


def no_rows(schema: Schema) -> Rows:
    """A record without rows: that of a trial which has not started."""
    return from_dicts([], schema)


def from_dicts(rows: Sequence[Mapping[str, Any]], schema: Schema, note: str = "") -> Rows:
    """Rows given as one mapping each; a column that a row lacks is null. Raises DamagedRecord, see `as_array`."""
    columns: dict[str, NDArray[Any]] = {}
    nulls: dict[str, NDArray[np.bool_]] = {}
    for column in schema.columns:
        values = [row.get(column.name) for row in rows]
        columns[column.name], nulls[column.name] = as_array(values, column)
    return Rows(schema, columns, nulls, note)


def as_array(values: list[Any], column: Column) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(values, nulls) of one column; None is null. Raises DamagedRecord for lists of different lengths."""
    null = np.array([v is None for v in values], dtype=bool)
    if column.kind == "int":
        return np.array([0 if v is None else v for v in values], dtype=np.int64), null
    if column.kind == "text":
        return np.array(values, dtype=object), null
    if column.kind == "float":
        return np.array([np.nan if v is None else v for v in values], dtype=np.float64), null
    width = max((len(v) for v in values if v is not None), default=0)
    if any(v is not None and len(v) != width for v in values):
        raise DamagedRecord(f"{column.name}: rows of different lengths")
    table = np.full((len(values), width), np.nan)
    for i, v in enumerate(values):
        if v is not None:
            table[i] = v
    return table, null


def check_steps(steps: NDArray[np.int64], schema: Schema) -> None:
    """Raises DamagedRecord unless steps are 0, 1, 2, ... or, where gaps are legal, increase from 0 on."""
    before = np.arange(len(steps)) - 1 if schema.contiguous else np.concatenate(([-1], steps))[:-1]
    wrong = np.flatnonzero(steps != before + 1 if schema.contiguous else steps <= before)
    if len(wrong):
        at = wrong[0]
        raise DamagedRecord(f"{schema.name}: step {steps[at]} where {int(before[at]) + 1} was expected")
