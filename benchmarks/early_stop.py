"""Early stopping by the rule `hopeless` (stabstudy/stability/hopeless.py), replayed on trials that ran to their ends.

Of each recorded trial the rule sees the rows up to each of its checks, as a launch would. A trial is hopeless where it
ended more than .2 nat/token above the best trial of its cell of other axes. Trials are split in two: on the one part
the limit of the scatter was chosen (the smallest of LIMITS for which, with 95 % confidence, under 5 % of the trials
that are ended would have ended within .2 nat, and one step more), on the other one it is reported. Printed, as one JSON
line each: the limits on the first part; by part and data set, how many trials are ended, how many of them wrongly, and
what share of the steps of hopeless trials is saved; the conclusions that change, a trial's verdict being one, and for
each cell of other axes the largest learning rate that is stable and the largest that works.

    python benchmarks/early_stop.py [--pilot FOLDER] [--study FOLDER ...] [--tiny]

--pilot: parquet files with the columns depth, lr, warmup_steps, clip, seed, final_loss, loss and grad_norm [steps];
depth 4 is the part that calibrates. --study: done studies; with `+` behind it, its even seeds calibrate too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import beta

from stabstudy import trace
from stabstudy.analysis import compare
from stabstudy.analysis.study import Study
from stabstudy.stability import hopeless
from stabstudy.stability.detectors import measured
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import TrialFacts, summarise
from stabstudy.stability.verdict import VERDICTS, MonitorFacts
from stabstudy.trace import Rows

Floats = NDArray[np.float64]
RULES = Rules()
LIMITS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
MARGIN = compare.STABLE_MARGIN
LR = "optim.lr"


@dataclass(frozen=True)
class Recorded:
    """A trial that ran to its end."""

    data: str  # the set it belongs to
    cell: str  # its settings, learning rate and seed aside
    lr: float
    seed: int
    calibrates: bool
    rows: Rows
    facts: TrialFacts
    loss: float  # final, capped at that of the start

    def until(self, steps: int) -> Rows:
        """Its first rows."""
        columns, nulls = ({n: c[n][:steps] for n in c} for c in (self.rows.columns, self.rows.nulls))
        return Rows(self.rows.schema, columns, nulls)


@dataclass(frozen=True)
class Replayed:
    """What the rule made of it."""

    trial: Recorded
    signs: tuple[tuple[int, hopeless.Signs], ...]  # by the number of steps
    hopeless: bool
    verdict: str | None  # at its end

    @property
    def facts(self) -> MonitorFacts:
        f = self.trial.facts
        return MonitorFacts(f.steps_planned, f.warmup_steps, f.init_loss, f.unigram_entropy)

    def ended_at(self, limit: float) -> int | None:
        """Steps after which it is ended with this limit of the scatter; None: never."""
        return next((n for n, signs in self.signs if signs.reason(self.facts, limit)), None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pilot", type=Path)
    arguments.add_argument("--study", action="append", default=[], help="a folder; FOLDER+: its even seeds calibrate")
    arguments.add_argument("--tiny", action="store_true", help="on a few synthetic trials, to see that all of it runs")
    given = arguments.parse_args()
    trials = list(synthetic()) if given.tiny else []
    trials += [] if given.pilot is None else list(of_pilot(given.pilot))
    for name in given.study:
        trials += of_study(Path(name.removesuffix("+")), name.endswith("+"))
    measure(trials)


def measure(trials: Sequence[Recorded]) -> list[dict[str, Any]]:
    """The lines, printed too."""
    replayed = replay(trials)
    chosen = [r for r in replayed if r.trial.calibrates]
    lines = [{"part": "calibration", "limit": limit} | _ended(chosen, limit) for limit in LIMITS]
    for part, of_part in (("calibration", chosen), ("report", [r for r in replayed if not r.trial.calibrates])):
        for data in dict.fromkeys(r.trial.data for r in of_part):
            own = [r for r in of_part if r.trial.data == data]
            lines.append({"part": part, "data": data} | _ended(own, hopeless.SCATTER))
        lines.append({"part": part, "data": "all"} | _ended(of_part, hopeless.SCATTER))
    lines.append({"part": "all", "data": "all"} | _ended(replayed, hopeless.SCATTER) | conclusions(replayed))
    for line in lines:
        print(json.dumps(line))
    return lines


def replay(trials: Sequence[Recorded]) -> list[Replayed]:
    """The signs of every trial at every check."""
    best: dict[tuple[str, str], float] = {}
    for t in trials:
        best[t.data, t.cell] = min(t.loss, best.get((t.data, t.cell), math.inf))
    replayed = []
    for t in trials:
        norm, loss = measured(t.rows, "grad_norm"), measured(t.rows, "loss")
        facts = MonitorFacts(t.facts.steps_planned, t.facts.warmup_steps, t.facts.init_loss, t.facts.unigram_entropy)
        checks = [n for n in hopeless.checks(t.facts.steps_planned) if n <= len(norm)]
        signs = tuple((n, hopeless.signs(norm[:n], loss[:n], facts, RULES)) for n in checks)
        verdict = summarise(t.rows, None, t.facts, RULES).columns["verdict"]
        assert isinstance(verdict, str | None)
        replayed.append(Replayed(t, signs, t.loss > best[t.data, t.cell] + MARGIN, verdict))
    return replayed


def _ended(replayed: Sequence[Replayed], limit: float) -> dict[str, Any]:
    """How many trials the rule ends, how many wrongly, and what it saves."""
    ends = [r.ended_at(limit) for r in replayed]
    planned = [r.trial.facts.steps_planned for r in replayed]
    saved = [0 if n is None else p - n for n, p in zip(ends, planned, strict=True)]
    bad = [r.hopeless for r in replayed]
    ended, wrong = (
        sum(n is not None for n in ends),
        sum(n is not None and not b for n, b in zip(ends, bad, strict=True)),
    )
    of_bad = sum(p for p, b in zip(planned, bad, strict=True) if b)
    saved_of_bad = sum(s for s, b in zip(saved, bad, strict=True) if b)
    return {
        "trials": len(replayed),
        "hopeless": sum(bad),
        "ended": ended,
        "ended within .2 nat": wrong,
        "upper 95 %": round(float(beta.ppf(0.95, wrong + 1, ended - wrong)), 3) if ended > wrong else None,
        "steps of hopeless trials saved": round(saved_of_bad / of_bad, 3) if of_bad else None,
        "steps saved": round(sum(saved) / max(1, sum(planned)), 3),
    }


def conclusions(replayed: Sequence[Replayed]) -> dict[str, Any]:
    """How many verdicts and frontiers there are, and how many the rule changes.

    A verdict changes where a trial that is ended was stable, or is judged worse as far as it ran than at its end.
    """
    seen = [_row(r, r.ended_at(hopeless.SCATTER)) for r in replayed]
    whole = [_row(r, None) for r in replayed]
    changed = [
        a["state"] == "stopped" and (b["verdict"] == "stable" or _rank(a["verdict"]) > max(0, _rank(b["verdict"])))
        for a, b in zip(seen, whole, strict=True)
    ]
    frontiers = [_frontiers(pd.DataFrame(rows)) for rows in (whole, seen)]
    moved = [key for key, value in frontiers[0].items() if frontiers[1][key] != value]
    return {
        "verdicts": len(seen),
        "verdicts changed": sum(changed),
        "frontiers": len(frontiers[0]),
        "frontiers moved": len(moved),
        "share changed": round((sum(changed) + len(moved)) / (len(seen) + len(frontiers[0])), 4),
        "moved": [f"{data} {cell}: {name}" for data, cell, name in moved],
    }


def _rank(verdict: str | None) -> int:
    return -1 if verdict is None else VERDICTS.index(verdict)


def _row(r: Replayed, ended_at: int | None) -> dict[str, Any]:
    """The trial in a table of its study, ended after so many steps or not at all."""
    facts, rows = r.trial.facts, r.trial.rows
    if ended_at is not None:
        facts = replace(facts, status="stopped", stop_reason=hopeless.HOPELESS, final_loss=None)
        rows = r.trial.until(ended_at)
    columns = summarise(rows, None, facts, RULES).columns
    names = ("verdict", "verdict_code", "verdict_reason", "n_evaluable", "final_loss_capped")
    own = {"data": r.trial.data, "cell": r.trial.cell, LR: r.trial.lr, "seed": r.trial.seed, "state": facts.status}
    return own | {"eval_hash": "e", "sampling_noise": None} | {name: columns[name] for name in names}


def _frontiers(table: pd.DataFrame) -> dict[tuple[str, str, str], Any]:
    """Of each cell of other axes the largest rate that is stable and the largest that works."""
    ends: dict[tuple[str, str, str], Any] = {}
    for key, part in table.groupby(["data", "cell"]):
        data, cell = map(str, key)
        (row,) = compare.limits(part, [LR], LR, None).to_dict("records")
        ends |= {(data, cell, name): _known(row[name]) for name in ("all_stable", "works_to")}
    return ends


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def of_pilot(folder: Path) -> Iterator[Recorded]:
    """The trials of the files."""
    table = pd.concat([pd.read_parquet(file) for file in sorted(folder.glob("*.parquet"))], ignore_index=True)
    for row in table.to_dict("records"):
        loss, norm = (np.asarray(row[name], np.float64) for name in ("loss", "grad_norm"))
        clip = None if math.isnan(row["clip"]) else float(row["clip"])
        first, final = float(loss[0]), float(row["final_loss"])
        facts = TrialFacts(len(loss), int(row["warmup_steps"]), clip, "done", "complete", first, final)
        cell = f"depth {row['depth']}, warmup {row['warmup_steps']}, clip {clip}"
        calibrates = row["depth"] == 4
        data = f"pilot, depth {row['depth']}"
        yield Recorded(data, cell, row["lr"], row["seed"], calibrates, record(loss, norm), facts, min(first, final))


def of_study(folder: Path, calibrates: bool) -> Iterator[Recorded]:
    """Its done trials."""
    study = Study.load(folder)
    for trial_id, row in study.trials[study.trials["state"] == "done"].iterrows():
        state = study.folder.trial(str(trial_id)).read_state()
        config = study.folder.trial(str(trial_id)).read_own()[0]
        facts = TrialFacts(
            config.train.steps, config.warmup_steps, config.optim.clip, "done", state.stop_reason, state.init_loss,
            state.final_loss, unigram_entropy=state.unigram_entropy,
        )  # fmt: skip
        cell = ", ".join(f"{axis} {row[axis]}" for axis in study.axes if axis != LR)
        even = calibrates and config.seed % 2 == 0
        loss = float(row["final_loss_capped"])
        yield Recorded(study.name, cell, config.optim.lr, config.seed, even, study.trace(str(trial_id)), facts, loss)


def synthetic(trials: int = 24, steps: int = 240) -> Iterator[Recorded]:
    """Norms that scatter, and losses that stay, the more the higher the rate; half of the trials calibrate."""
    for i in range(trials):
        rng, rate = np.random.default_rng(i), (i // 4) / (trials // 4 - 1)
        norm = np.exp((0.1 + 0.6 * rate) * rng.standard_normal(steps))
        end = 2.3 + 0.7 * rate
        loss = end + (5.5 - end) * np.exp(-np.arange(steps) / 40) + 0.05 * rng.standard_normal(steps)
        facts = TrialFacts(steps, 20, 1.0, "done", "complete", 5.5, end, unigram_entropy=3.2)
        yield Recorded("synthetic", "all", 1e-3 * 10 ** (2 * rate), i % 4, i % 2 == 0, record(loss, norm), facts, end)


def record(loss: Floats, norm: Floats) -> Rows:
    """A trace of these values; the rest of it is null."""
    rows = trace.no_rows(trace.TRACE)
    n, given = len(loss), {"step": np.arange(len(loss)), "loss": loss, "grad_norm": norm}
    columns = {
        c.name: given.get(c.name, np.zeros((n, *rows[c.name].shape[1:]), rows[c.name].dtype))
        for c in rows.schema.columns
    }
    nulls = {c.name: np.full(n, c.name not in given) for c in rows.schema.columns}
    return Rows(rows.schema, columns, nulls)


if __name__ == "__main__":
    main()
