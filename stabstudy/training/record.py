"""The recorder of a pack: step vectors from the device become rows of each member's trace, spikes and divergence.

It takes blocks of steps of all members at once, so that no Python is spent on a single row. `judge` says where trials
end and must come before anything that depends on it; `write` makes rows of all that waits, and may come later: while
the device does its next steps, or when it is `due`. Rows behind the step that ended a trial are dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabstudy import live
from stabstudy.config import TrialConfig
from stabstudy.stability.detectors import NO_TARGETS, SPIKE, Block, Floats, Ints, LiveSpikes
from stabstudy.stability.rules import Rules
from stabstudy.stability.verdict import DivergenceMonitor, MonitorFacts
from stabstudy.trace import PROBES, SKIPS, TRACE_KTO, Rows, of_objective, widths
from stabstudy.training.clipping import NoiseMeans
from stabstudy.training.driver import Taken, Tick
from stabstudy.training.kto import COUNTS, MEASURED_BY
from stabstudy.training.probes import OF_LAYERS, SCALARS

JUDGED_AT_ONCE = 32
"""Steps that the spike detector takes in one block: one at a time would cost a hundred times as much."""

NULL_WITHOUT_TARGETS = ("loss", "grad_norm", "clip_scale", "layer_grad_norm", "logit_absmax", "logz_mean", "loss_scale")


@dataclass(frozen=True)
class Recorded:
    """What the recorder needs of one member."""

    config: TrialConfig
    trace: live.Writer
    probes: live.Writer
    facts: MonitorFacts
    noise: NoiseMeans
    rows: int  # recorded before


@dataclass(frozen=True)
class _Block:
    """Steps that are judged and not yet written."""

    at: Ints  # [K], each member's first step
    counts: Ints  # [K], its rows
    lr: Floats  # [K, n]
    values: Floats  # [K, n, columns + tensors]
    judged: Block
    seconds: Floats  # [n], of each step
    urgent: NDArray[np.bool_]  # [K], whether a member ended, or skipped a step
    probes: list[tuple[int, int, bool, Floats]]  # member, state after so many updates, whether evaluated, vector


class Recorder:
    """Records K members. `rows` [K] counts each one's; `loss` and `grad_norm` [K] are the last."""

    def __init__(
        self,
        members: Sequence[Recorded],
        columns: Sequence[str],
        layer_index: NDArray[np.int64],
        rules: Rules,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.members = tuple(members)
        self.columns = {name: i for i, name in enumerate(columns)}
        self.groups = np.flatnonzero(np.diff(layer_index, prepend=-1))  # the first tensor of each layer group
        self.monitor = DivergenceMonitor(rules, [m.facts for m in members])
        self.spikes = LiveSpikes(rules, len(self.members))
        self._places = tuple(range(len(self.members)))
        self.rows = np.array([m.rows for m in members], np.int64)
        self.loss, self.grad_norm = (np.full(len(self.members), math.nan) for _ in range(2))
        self.seconds = math.nan  # of the last step
        self.probed = [-1] * len(self.members)  # the last state of each that was probed
        configs = [m.config for m in members]
        self._no_clip = np.array([c.optim.clip is None for c in configs])[:, None]
        self._unscaled = np.array([c.train.precision != "fp16" for c in configs])[:, None]
        policies = ["amp" if c.train.precision == "fp16" else "nonfinite" for c in configs]
        skips = [p == "amp" or c.train.skip_nonfinite for p, c in zip(policies, configs, strict=True)]
        self._policy = np.array([1 + SKIPS.index(p) if s else 0 for p, s in zip(policies, skips, strict=True)])[:, None]
        self._tokens = np.array([c.tokens_per_step for c in configs])[:, None]
        self._masked = np.array([c.objective.kind != "lm" for c in configs])[:, None]
        self._seen = np.zeros(len(configs), np.int64)  # targets in the rows that are written
        self._widths = widths(configs[0].model.depth)
        self._trace = of_objective(configs[0].objective.kind)
        self._waiting: list[_Block] = []
        self._unjudged: list[Block] = []
        self._new_steps = 0  # that the spike detector has not seen
        self._anomaly = False  # among the steps that wait
        self._clock, self._flushed_at = clock, clock()

    @property
    def due(self) -> bool:
        """Whether rows should wait no longer: one holds an anomaly, or may hold a spike, or a second has passed."""
        return self._anomaly or self._new_steps >= JUDGED_AT_ONCE or self._late

    @property
    def _late(self) -> bool:
        return self._clock() - self._flushed_at >= live.FLUSH_SECONDS

    def replay(self, traces: Sequence[Rows]) -> None:
        """Bring the live detectors to where an uninterrupted pack would have them."""
        n = max(len(rows) for rows in traces)
        self._seen = np.array([rows["tokens"][-1] if len(rows) else 0 for rows in traces], np.int64)
        if n:
            block = _padded([Block.of(rows) for rows in traces], n)
            self.monitor.update(block)
            self._find_spikes(block)

    def judge(self, places: Sequence[int], ticks: Sequence[Tick], taken: Taken, seconds: float) -> dict[int, int]:
        """Take what these ticks measured; returns the place among them at which trials diverged, by member.

        Args:
            places: The member of each row of the vectors; others have ended before.
            ticks: All with the same members live.
            taken: Of the ticks.
            seconds: Of each step.
        """
        values, lr, counts = self._placed(places, ticks, taken.steps)
        judged = self._judged(values, counts)
        fired = self.monitor.update(judged)
        ends = {k: int(i) for k, i in enumerate(fired.tolist()) if i >= 0 and counts[k]}
        probes = self._probes(places, taken, counts, ends) if taken.probes else []
        # a value that is not finite either skips its step or ends its trial
        urgent = np.asarray(judged.skip.any(axis=1))
        for k, i in ends.items():
            counts[k], urgent[k] = i + 1, True
        self._anomaly = self._anomaly or bool(urgent.any())
        step_seconds = np.full(len(ticks), seconds)
        self._waiting.append(_Block(self.rows, counts, lr, values, judged, step_seconds, urgent, probes))
        self.rows = self.rows + counts
        self._new_steps += len(ticks)
        self._keep_last(judged, counts)
        self.seconds = seconds
        return ends

    def write(self) -> None:
        """Make rows of all that is judged. Anomalies reach the disk at once, and so does all, once in a second."""
        if not self._waiting:
            return
        block, late = _together(self._waiting), self._late
        self._waiting, self._anomaly = [], False
        urgent = late | block.urgent | self._find_spikes(_with_rows(block.judged, block.counts))
        table = self._table(block)
        for k in np.flatnonzero(block.counts).tolist():
            self.members[k].trace.append(table[k, : block.counts[k]], urgent=bool(urgent[k]))
        self._write_probes(block.probes)
        if late:
            for member in self.members:
                member.probes.flush()
            self._flushed_at = self._clock()

    def add_probe(self, k: int, done: int, vector: Floats, evaluated: bool) -> None:
        """Append the probes row of a member's state after `done` updates."""
        self._write_probes([(k, done, evaluated, vector)])

    def _write_probes(self, probes: Sequence[tuple[int, int, bool, Floats]]) -> None:
        """Rows of many members at once; each member's in the order given."""
        if not probes:
            return
        ordered = sorted(probes, key=lambda probe: probe[0])
        table = self._probes_table(ordered)
        of = [k for k, *_ in ordered]
        lost = ~np.isfinite(table["param_norm"])
        ends = [i for i in range(1, len(of) + 1) if i == len(of) or of[i] != of[i - 1]]
        for begin, end in zip([0, *ends], ends, strict=False):
            k, done = of[begin], ordered[end - 1][1]
            self.probed[k] = done
            self.members[k].probes.append(table[begin:end], urgent=bool(lost[begin:end].any()))

    def _probes_table(self, probes: Sequence[tuple[int, int, bool, Floats]]) -> NDArray[np.void]:
        """The rows [n] of the probes."""
        vectors = np.stack([vector for *_, vector in probes])
        columns: dict[str, Any] = dict(zip(SCALARS, vectors.T, strict=False))
        unsized = columns.pop("sized") == 0
        pairs = zip(columns["noise_g2"].tolist(), columns["noise_s"].tolist(), strict=True)
        noise = [self.members[k].noise.row(*pair) for (k, *_), pair in zip(probes, pairs, strict=True)]
        nulls = {"update_rms": unsized, "adam_rms_max": unsized, "val_loss": np.array([not e for _, _, e, _ in probes])}
        for name in ("noise_g2", "noise_s", "noise_scale"):
            values = [row[name] for row in noise]
            nulls[name] = np.array([x is None for x in values])
            columns[name] = np.array([math.nan if x is None else x for x in values])
        layers = vectors[:, len(SCALARS) :].reshape(len(probes), len(OF_LAYERS), -1)
        columns |= {name: layers[:, i] for i, name in enumerate(OF_LAYERS)}
        columns["step"] = np.array([done for _, done, _, _ in probes])
        return live.records(PROBES, self._widths, columns, nulls)

    def _probes(
        self, places: Sequence[int], taken: Taken, counts: Ints, ends: dict[int, int]
    ) -> list[tuple[int, int, bool, Floats]]:
        """The probes that are due; one that finds weights that are not finite ends its member, see `ends`."""
        rows = []
        for i, vectors in sorted(taken.probes.items()):
            for place, k in enumerate(places):
                done, train = int(self.rows[k]) + i + 1, self.members[k].config.train
                due, evaluated = done % train.probe_every == 0, done % train.eval_every == 0
                if i >= min(counts[k], ends.get(k, counts[k])) or done >= train.steps or not (due or evaluated):
                    continue
                rows.append((k, done, evaluated, vectors[place].copy()))  # the driver may use its table again
                if not math.isfinite(vectors[place][SCALARS.index("param_norm")]):
                    self.monitor.weights_not_finite(k, done - 1)
                    ends[k] = i
        return rows

    def _placed(
        self, places: Sequence[int], ticks: Sequence[Tick], steps: NDArray[np.float64]
    ) -> tuple[Floats, Floats, Ints]:
        """What the ticks measured, their rates, and their number, of every member: [K, n, ...], [K, n] and [K]."""
        n, K = len(ticks), len(self.members)
        values, lr = steps.swapaxes(0, 1), np.array([tick.lr for tick in ticks]).T
        if all(ticks[0].live) and tuple(places) == self._places:
            return values, lr, np.full(K, n)
        counts, all_values, all_lr = np.zeros(K, np.int64), np.full((K, *values.shape[1:]), math.nan), np.zeros((K, n))
        counts[[p for p, live_now in zip(places, ticks[0].live, strict=True) if live_now]] = n
        all_values[list(places)], all_lr[list(places)] = values, lr
        return all_values, all_lr, counts

    def _judged(self, values: Floats, counts: Ints) -> Block:
        loss, norm, spike, targets = (self._column(values, c) for c in ("loss", "grad_norm", "spike", "targets"))
        empty, finite = targets == 0, np.isfinite(loss) & np.isfinite(norm)
        null = empty if empty.any() else None
        if null is None and finite.all() and not spike.any():
            skip = np.zeros(loss.shape, np.uint8)
        else:
            skip = np.where(empty, NO_TARGETS, np.where(finite, SPIKE * (spike > 0), self._policy)).astype(np.uint8)
            skip[counts == 0] = 0
        return _with_rows(Block(loss, norm, skip, None, null, null), counts)

    def _keep_last(self, judged: Block, counts: Ints) -> None:
        """Loss and norm of each member's last row."""
        if (counts == judged.loss.shape[1]).all():
            self.loss, self.grad_norm = judged.loss[:, -1].copy(), judged.norm[:, -1].copy()
            return
        of = np.flatnonzero(counts)
        last = counts[of] - 1
        self.loss[of], self.grad_norm[of] = judged.loss[of, last], judged.norm[of, last]

    def _find_spikes(self, block: Block) -> NDArray[np.bool_]:
        """Let the detector take the steps once there are enough; True for members where it flags one."""
        self._unjudged.append(block)
        self._new_steps = sum(b.loss.shape[1] for b in self._unjudged)
        if self._new_steps < JUDGED_AT_ONCE:
            return np.zeros(len(self.members), np.bool_)
        blocks, self._unjudged, self._new_steps = self._unjudged, [], 0
        return self.spikes.update(_joined(blocks))

    def _table(self, block: _Block) -> NDArray[np.void]:
        """The rows [K, n] of the trace."""
        values, n = block.values, block.lr.shape[1]
        step = block.at[:, None] + np.arange(n)
        empty = block.judged.skip == NO_TARGETS
        squares = np.add.reduceat(values[..., len(self.columns) :] ** 2, self.groups, axis=-1)
        columns = {
            "step": step,
            "tokens": np.where(self._masked, self._counted(block), (step + 1) * self._tokens),
            "seconds": np.round(block.seconds, 6),
            "lr": block.lr,
            "layer_grad_norm": np.sqrt(squares),
            "skip": np.maximum(block.judged.skip, 1) - 1,
        }
        measured = {c.name: self._column(values, c.name) for c in self._trace.columns if c.name in self.columns}
        # counts of members without a row are NaN, which is no whole number
        columns |= {n: np.nan_to_num(x) if n in COUNTS else x for n, x in measured.items()}
        nulls = dict.fromkeys(NULL_WITHOUT_TARGETS, empty) | {"skip": block.judged.skip == 0}
        nulls |= {"clip_scale": empty | self._no_clip, "loss_scale": empty | self._unscaled}
        if self._trace is TRACE_KTO:
            nulls |= {name: self._unmeasured(values, name) for name in MEASURED_BY if name != "loss"}
        return live.records(self._trace, self._widths, columns, nulls)

    def _unmeasured(self, values: Floats, name: str) -> NDArray[np.bool_]:
        """Where there was nothing to take a mean over, [K, n]."""
        counts = [self._column(values, count) == 0 for count in MEASURED_BY[name]]
        return np.asarray(np.logical_or.reduce(counts))

    def _counted(self, block: _Block) -> Ints:
        """Targets [K, n] seen up to each row, where their number differs from step to step."""
        targets = self._column(block.values, "targets")
        is_row = np.arange(targets.shape[1]) < block.counts[:, None]
        seen: Ints = self._seen[:, None] + np.cumsum(np.where(is_row, targets, 0).astype(np.int64), axis=1)
        self._seen = seen[:, -1]
        return seen

    def _column(self, values: Floats, name: str) -> Floats:
        return values[..., self.columns[name]]


def _with_rows(block: Block, rows: Ints) -> Block:
    counts = None if (rows == block.loss.shape[1]).all() else rows.copy()
    return Block(block.loss, block.norm, block.skip, counts, block.loss_null, block.norm_null)


def _padded(blocks: Sequence[Block], n: int) -> Block:
    """Blocks of one member each as one of all."""

    def joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([np.pad(a, ((0, 0), (0, n - a.shape[1]))) for a in arrays])

    nulls = [
        joined([np.zeros(b.loss.shape, np.bool_) if null is None else null for b, null in zip(blocks, of, strict=True)])
        for of in ([b.loss_null for b in blocks], [b.norm_null for b in blocks])
    ]
    loss, norm, skip = (joined([getattr(b, name) for b in blocks]) for name in ("loss", "norm", "skip"))
    return Block(loss, norm, skip, np.array([b.loss.shape[1] for b in blocks]), *nulls)


def _together(blocks: Sequence[_Block]) -> _Block:
    """Blocks of steps in a row as one. A member's rows stay in a row: who ended in one has none in the next."""
    if len(blocks) == 1:
        return blocks[0]
    lr, values = (np.concatenate(parts, 1) for parts in ([b.lr for b in blocks], [b.values for b in blocks]))
    seconds, judged = np.concatenate([b.seconds for b in blocks]), _joined([b.judged for b in blocks])
    counts, urgent = np.sum([b.counts for b in blocks], axis=0), np.any([b.urgent for b in blocks], axis=0)
    probes = [probe for b in blocks for probe in b.probes]
    return _Block(blocks[0].at, counts, lr, values, judged, seconds, urgent, probes)


def _joined(blocks: Sequence[Block]) -> Block:
    """Likewise; which values are null is left out."""
    if len(blocks) == 1:
        return blocks[0]
    loss, norm, skip = (np.concatenate([getattr(b, name) for b in blocks], 1) for name in ("loss", "norm", "skip"))
    return Block(loss, norm, skip, np.sum([b.lengths for b in blocks], axis=0))
