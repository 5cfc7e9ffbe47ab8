"""The judgement of a trial of our own, made once at its end and kept in its folder as `summary.json`.

    summary.json    {format, detector_id, source_sha256, columns: its statistics, spikes: a row each}, in one line

A report reads it. Only where it is missing (older studies), was made by other rules, or belongs to another state of the
trial is the trial judged anew, by the same function.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabstudy import config as cfg
from stabstudy import seals
from stabstudy.config import TrialConfig
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.events import SPIKE_COLUMNS
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import Summary, TrialFacts, summarise
from stabstudy.store import State, StoreError, TrialFolder, read_json, write_bytes
from stabstudy.trace import Rows

FORMAT = 3
"""Goes up when a statistic is computed in a new way: a summary of another format is never taken over."""

_OF_STATE = (
    *("status", "stop_reason", "init_loss", "final_loss", "growth_act", "growth_grad"),
    *("unigram_entropy", "train_tokens", "eval_hash", "eval_tokens", "records", "error"),
)
"""The fields of a state that a judgement depends on; not attempts, hosts and times."""


@dataclass(frozen=True)
class Source:
    """What a judgement is made from, records aside."""

    config: TrialConfig
    state: State

    @property
    def facts(self) -> TrialFacts:
        """Facts that the trace does not hold."""
        c, state = self.config, self.state
        return TrialFacts(
            steps_planned=c.train.steps,
            warmup_steps=c.warmup_steps,
            clip=c.optim.clip,
            clip_kind=c.optim.clip_kind,
            beta2=c.optim.beta2,
            parameters=c.model.parameters(vocab=0),
            timescale=c.decay_timescale,
            status=state.status,
            stop_reason=state.stop_reason,
            init_loss=state.init_loss,
            final_loss=state.final_loss,
            unigram_entropy=state.unigram_entropy,
            train_tokens=state.train_tokens,
            growth_act=state.growth_act,
            growth_grad=state.growth_grad,
        )

    @property
    def sha256(self) -> str:
        """First 16 hex digits of the sha256 of all that the judgement depends on."""
        return source_sha256(cfg.flat(self.config), self.state)


def source_sha256(settings: Mapping[str, Any], state: State, log: Mapping[str, Any] | None = None) -> str:
    """Names settings, state and, of an ingested run, what its log is; 16 hex digits.

    The records of a state stand in it by their values without wall time, where the state has the sha256 of these.
    """
    fields = {k: getattr(state, k) for k in _OF_STATE}
    fields["records"] = {name: _record(record) for name, record in state.records.items()}
    known = {name: value for name, value in settings.items() if name not in cfg.ADDED or value != cfg.ADDED[name]}
    text = json.dumps(
        [fields, {cfg.FORMER_NAMES.get(k, k): v for k, v in known.items()}, log], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _record(record: Mapping[str, Any]) -> Mapping[str, Any]:
    values = record.get("values_sha256")
    return {"rows": record["rows"], "values_sha256": values} if values else record


def judge_trial(trace: Rows, probes: Rows | None, source: Source, rules: Rules) -> Summary:
    """The statistics, the verdict and the spikes of a trial, from its complete records."""
    return summarise(trace, probes, source.facts, rules)


def write_summary(folder: TrialFolder, summary: Summary, source: Source, rules: Rules) -> None:
    """Keep a judgement, whole or not at all.

    It is not made durable: a trial whose summary a power cut took or damaged is judged anew.
    """
    body = {
        "format": FORMAT,
        "detector_id": rules.detector_id,
        "source_sha256": source.sha256,
        "columns": _encoded(summary.columns),
        "spikes": [_encoded(spike) for spike in summary.spikes],
    }
    text = json.dumps(seals.sealed(body), allow_nan=False) + "\n"
    write_bytes(folder.summary_file, text.encode(), synced="nothing")


def read_summary(folder: TrialFolder, source: Source, rules: Rules) -> Summary | None:
    """The judgement kept in the folder; None where there is none, or it is not of this source and these rules."""
    wanted = {"format": FORMAT, "detector_id": rules.detector_id, "source_sha256": source.sha256}
    try:
        body = seals.opened(read_json(folder.summary_file))
        return _summary(body) if all(body.get(k) == v for k, v in wanted.items()) else None
    except (StoreError, KeyError, TypeError, ValueError):  # whatever damage there is, the trial can be judged anew
        return None


def _summary(body: Mapping[str, Any]) -> Summary:
    """Of a body of this format. Raises KeyError, TypeError or ValueError for one that was changed by hand."""
    columns, spikes = body["columns"], body["spikes"]
    if set(columns) != set(COLUMNS) or any(set(s) != {*SPIKE_COLUMNS, "detector_id"} for s in spikes):
        raise ValueError("columns of another version")
    kinds = {name: definition.kind for name, definition in COLUMNS.items()}
    decoded = {n: float(v) if kinds[n] == "float" and v is not None else v for n, v in columns.items()}
    return Summary({name: decoded[name] for name in COLUMNS}, [_decoded(spike) for spike in spikes])


def _encoded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: seals.encode_float(v) if isinstance(v, float) else v for k, v in row.items()}


def _decoded(spike: Mapping[str, Any]) -> dict[str, Any]:
    """A peak may be any float; JSON has text for those that are not finite."""
    return {k: float(v) if v in ("NaN", "Infinity", "-Infinity") else v for k, v in spike.items()}
