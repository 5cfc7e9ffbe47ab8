"""Plants a study on disk through store.py and trace.py, with traces whose answers are known.

The norms are log-normal around a decaying level; a planted spike multiplies single steps. Everything is a pure function
of the arguments, so two planted studies are equal byte by byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import live_rows
import numpy as np

from stabstudy import config as cfg
from stabstudy.config import TrialConfig
from stabstudy.state import Attempt, State
from stabstudy.store import StudyFolder, TrialFolder
from stabstudy.trace import PROBES, TRACE

FINGERPRINT = "f" * 16
EVAL_HASH = "e" * 16
INIT_LOSS = 5.5


def settings(
    depth: int = 2,
    lr: float = 3e-3,
    clip: float | None = 1.0,
    seed: int = 0,
    steps: int = 120,
    warmup: int = 10,
    batch_size: int = 8,
    data: Mapping[str, Any] | None = None,
) -> TrialConfig:
    """A small TrialConfig; the arguments are the usual axes."""
    values = {
        "model": {"depth": depth},
        "optim": {"lr": lr, "clip": clip, "warmup_steps": warmup},
        "train": {"steps": steps, "batch_size": batch_size},
        "data": dict(data or {}),
        "seed": seed,
    }
    return cfg.from_dict(values)


def norms(
    steps: int, seed: int = 0, level: float = 0.6, log_sd: float = 0.08, spikes: Mapping[int, float] | None = None
) -> list[float]:
    """Log-normal gradient norms that fall from about 8x to 1x `level`; `spikes` maps a step to its factor."""
    rng = np.random.default_rng(seed)
    base = level * (1 + 7 * np.exp(-np.arange(steps) / 12)) * np.exp(rng.normal(0, log_sd, steps))
    for step, factor in (spikes or {}).items():
        base[step] *= factor
    return [float(v) for v in base]


def plant_trial(
    study: Path,
    config: TrialConfig,
    *,
    log_sd: float = 0.08,
    spikes: Mapping[int, float] | None = None,
    final_loss: float | None = 2.5,
    logit: float = 4.0,
    status: str = "done",
    stop_reason: str | None = "complete",
    steps_done: int | None = None,
    nonfinite_at: int | None = None,
    choices: Mapping[str, str] | None = None,
    case: str | None = None,
    fingerprint: str = FINGERPRINT,
    eval_hash: str = EVAL_HASH,
    error: Mapping[str, Any] | None = None,
) -> TrialFolder:
    """Write one trial's config, records and state. Anything but `done` leaves the live `.jsonl` files."""
    folder = StudyFolder(study).trial(cfg.trial_id(config, fingerprint))
    folder.path.mkdir(parents=True)
    write_config(folder, config, choices or {"data": "pysrc", "model": "tiny"}, case, fingerprint)
    steps = config.train.steps if steps_done is None else steps_done
    grads = norms(config.train.steps, seed=int(folder.trial_id, 16), log_sd=log_sd, spikes=spikes)[:steps]
    if nonfinite_at is not None:
        grads[nonfinite_at] = math.nan
    records = write_records(folder, config, grads, logit, finish=status == "done")
    attempt = Attempt("planted", 1, "2026-01-02T03:04:05+00:00", ended="2026-01-02T03:05:05+00:00", status=status)
    attempt = dataclasses.replace(attempt, engine={"torch": "2.10.0", "device": "cpu", "threads": 1})
    state = State(
        folder.trial_id,
        status=status,
        step=steps,
        attempts=(attempt,),
        stop_reason=stop_reason if status == "done" else None,
        init_loss=INIT_LOSS,
        final_loss=final_loss if status == "done" else None,
        eval_hash=eval_hash,
        records=records,
        error=dict(error) if error else None,
    )
    folder.write_state(state)
    return folder


def write_config(
    folder: TrialFolder, config: TrialConfig, choices: Mapping[str, str], case: str | None, fingerprint: str
) -> None:
    """config.json as the launcher writes it."""
    body = {
        "format": cfg.FORMAT_VERSION,
        "trial_id": folder.trial_id,
        "cell_id": cfg.cell_id(config, fingerprint),
        "config": cfg.to_dict(config),
        "choices": dict(choices),
        "case": case,
        "data_fingerprint": fingerprint,
    }
    folder.config_file.write_text(json.dumps(body))


def write_records(
    folder: TrialFolder, config: TrialConfig, grads: Sequence[float], logit: float, finish: bool
) -> dict[str, Any]:
    """The trace and the probes; finished ones are compacted. Returns what `State.records` holds."""
    trace_rows = [_trace_row(config, step, g) for step, g in enumerate(grads)]
    probe_steps = range(0, len(grads) + 1, config.train.probe_every)
    probe_rows = [_probe_row(config, step, logit) for step in probe_steps]
    records: dict[str, Any] = {}
    for schema, rows in ((TRACE, trace_rows), (PROBES, probe_rows)):
        live_rows.write(folder.live(schema), rows, schema, per_block=10)
        if finish:
            count, sha = live_rows.compact(
                folder.live(schema), folder.finished(schema), schema, {"trial_id": folder.trial_id}
            )
            records[schema.name] = {"rows": count, "sha256": sha}
            folder.live(schema).unlink()
    return records


def loss_at(step: int) -> float:
    """The planted training loss: from the initial loss down to about 2.4, exactly the same in every trial."""
    return 2.4 + (INIT_LOSS - 2.4) * math.exp(-step / 25)


def _trace_row(config: TrialConfig, step: int, grad: float) -> dict[str, Any]:
    clip = config.optim.clip
    groups = config.model.depth + 2
    return {
        "step": step,
        "tokens": (step + 1) * config.tokens_per_step,
        "seconds": 0.01,
        "lr": config.optim.lr * min(1.0, (step + 1) / max(1, config.warmup_steps)),
        "loss": loss_at(step),
        "grad_norm": grad,
        "clip_scale": None if clip is None else (min(1.0, clip / (grad + 1e-6)) if grad == grad else math.nan),
        "layer_grad_norm": [grad / math.sqrt(groups)] * groups,
        "logit_absmax": 6.0,
        "logz_mean": 5.0,
        "loss_scale": None,
        "skip": None,
    }


def _probe_row(config: TrialConfig, step: int, logit: float) -> dict[str, Any]:
    depth = config.model.depth
    return {
        "step": step,
        "val_loss": loss_at(step) if step % config.train.eval_every == 0 else None,
        "update_rms": None if step == 0 else 0.3,
        "adam_rms_max": None if step == 0 else 1.0,
        "attn_logit_max": [logit * (1 + layer) * (1 + step) / config.train.steps for layer in range(depth)],
        "attn_entropy": [0.8] * depth,
        "resid_rms": [1.0] * depth,
        "param_norm": 30.0,
        "noise_g2": None,
        "noise_s": None,
        "noise_scale": None,
    }


ROUGH, LONG = (60, 75, 90, 105), range(60, 73)
"""Steps of `plant_study`'s rough and of its spiky trials."""

QUESTION = "Does the largest stable learning rate fall as the model gets deeper?"


def plant_frame(study: Path, question: str = QUESTION) -> None:
    """sweep.yaml and provenance.json, as a launch leaves them."""
    study.mkdir(parents=True, exist_ok=True)
    (study / "trials").mkdir(exist_ok=True)
    (study / "sweep.yaml").write_text(f"# @package _global_\n# {question}\n")
    provenance = {
        "question": question,
        "axes": ["model.depth", "optim.lr"],
        "argv": ["sweep=planted"],
        "versions": {"python": "3.11.2", "torch": "2.10.0"},
        "git": {"commit": "0" * 40, "dirty": False},
    }
    (study / "provenance.json").write_text(json.dumps(provenance))


def plant_study(
    study: Path,
    depths: Sequence[int] = (2, 6),
    lrs: Sequence[float] = (1e-3, 1e-2, 1e-1),
    seeds: Sequence[int] = (0, 1),
    clips: Sequence[float | None] = (1.0,),
    steps: int = 120,
) -> Path:
    """A grid in which the largest learning rate is rough at every depth; at the larger depth one seed spikes earlier.

    Rough trials have eight times the level at steps 60, 75, 90 and 105: four stretches of absolute flags. At the
    largest depth and the second largest of three or more rates, seed 1 is spiky: it has that from step 60 to 72, one
    spike that lasts too long (R1). All others are stable. Losses have an optimum at the middle rate; the attention
    logits grow with the rate.
    """
    plant_frame(study)
    top = sorted(lrs)[-1]
    for depth in depths:
        for lr in lrs:
            for clip in clips:
                for seed in seeds:
                    spiky = depth == max(depths) and len(lrs) > 2 and lr == sorted(lrs)[-2] and seed == 1
                    plant_trial(
                        study,
                        settings(depth, lr, clip, seed, steps),
                        spikes=dict.fromkeys(ROUGH if lr == top else LONG if spiky else (), 8.0),
                        log_sd=0.08 if lr < top else 0.1,
                        final_loss=2.4 + 0.3 * abs(math.log10(lr) + 2) ** 2 + 0.02 * seed - 0.01 * depth,
                        logit=2000 * lr,
                    )
    return study
