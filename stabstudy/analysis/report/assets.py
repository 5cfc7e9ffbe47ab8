"""Scripts beside the pages: the plotting library of the installed package, and the trace of each trial.

A page may load what lies in assets/ (`script-src 'self'`), but from a disk it may read no other file, so a trace is a
script as well. Nothing here comes from a network, and without these files the pages are whole but for their curves.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabstudy.analysis.figures import step_chart
from stabstudy.analysis.figures.tooltips import packed, thinned
from stabstudy.analysis.spreading import spread
from stabstudy.analysis.study import Study
from stabstudy.store import sweep_abandoned, write_bytes, write_text
from stabstudy.trace import DamagedRecord, Rows

ASSETS = "assets/"
"""The folder of the scripts, beside the study's page."""

LIBRARY, TRACES = "plotly.js", "traces"

MOST_POINTS = 2_000
"""Steps of a trace up to which its script has all; of a longer one it has half as many, see `thinned`."""

CURVES = {
    "grad_norm": "gradient norm",
    "loss": "training loss",
    "attn_logit_max": "largest attention logit",
    "val_loss": "validation loss",
    "clip_scale": "factor of clipping",
    "logit_absmax": "largest output logit",
    "attn_entropy": "smallest attention entropy",
    "update_rms": "update RMS",
    "adam_rms_max": "largest Adam RMS",
    "resid_rms": "largest residual RMS",
    "param_norm": "norm of the weights",
    "noise_scale": "noise scale (tokens)",
    "kl": "KL",
    "margin": "margin of rewards",
}
"""The curves that a trace's script may have, and what they are called; the first three are shown unasked."""

LOGARITHMIC = ("grad_norm", "attn_logit_max", "clip_scale", "logit_absmax", "resid_rms", "noise_scale")

_STEPWISE = ("grad_norm", "loss", "clip_scale", "logit_absmax", "kl", "margin")
_PROBED = (
    "val_loss", "attn_logit_max", "attn_entropy", "update_rms", "adam_rms_max", "resid_rms", "param_norm",
    "noise_scale",
)  # fmt: skip
_SMALLEST = ("attn_entropy",)

_FORMAT = "1"
_TRACE_S = 0.012
"""Seconds that the script of a trace takes, roughly."""


def write_assets(study: Study, trials: Sequence[str], folder: Path) -> None:
    """Write the library, where its package is installed, and the traces of these trials; what is there is left."""
    (folder / TRACES).mkdir(parents=True, exist_ok=True)
    if (script := library()) is not None and _bytes(folder / LIBRARY) != script:
        write_bytes(folder / LIBRARY, script)
    write = functools.partial(_write_traces, study, folder / TRACES)
    written = set(spread(write, trials, _TRACE_S * len(trials)))
    for file in (folder / TRACES).iterdir():
        if file.name not in written and re.fullmatch(r"[0-9a-f]{10}\.js", file.name):
            file.unlink()
    sweep_abandoned(folder)
    sweep_abandoned(folder / TRACES)


@functools.cache
def library() -> bytes | None:
    """The script of the installed plotly; None where it is not installed.

    The script adds a style sheet for maps, which no page has and the pages' policy forbids, unless an element of a
    certain id is there: a line before the package's bytes adds it.
    """
    spec = importlib.util.find_spec("plotly")
    if spec is None or (script := _bytes(Path(str(spec.origin)).with_name("package_data") / "plotly.min.js")) is None:
        return None
    ids = sorted(set(re.findall(rb'getElementById\("([0-9a-f]{64})"\)', script)))
    mark = "document.head.append(Object.assign(document.createElement('meta'), { id: '%s' }));"
    return "".join(f"{mark % i.decode()}\n" for i in ids).encode() + script


def _write_traces(study: Study, folder: Path, ids: Sequence[str]) -> list[str]:
    """Write the scripts of these trials' traces; answers with the files' names."""
    names = []
    for trial_id in ids:
        row = study.row(trial_id)
        file = folder / f"{trial_id}.js"
        head = f"// {_digest(_FORMAT, str(row['source_sha256']))}\n"
        if row["state"] != "done" or not _starts_with(file, head):
            text = head + trace_script(study, trial_id)
            if _bytes(file) != text.encode():
                write_text(file, text)
        names.append(file.name)
    return names


def trace_script(study: Study, trial_id: str) -> str:
    """JavaScript that hands a trial's curves to `charts`: the lists of steps, and each curve as [list, values].

    All in base64 of float32. Of equal stretches of a long trace it has the smallest and the largest value of the norm
    and of the loss; what was probed is whole, of layers the largest (of the attention entropy the smallest).
    """
    curves: dict[str, tuple[str, str]] = {}
    with contextlib.suppress(DamagedRecord):  # it was readable when the tables were made
        rows, probes = study.trace(trial_id, _STEPWISE), study.probes(trial_id)
        kept = thinned(rows["grad_norm"], rows["loss"], most=MOST_POINTS)
        curves |= _curves(rows, [n for n in _STEPWISE if n in rows.schema.names], kept)
        if probes is not None:
            curves |= _curves(probes, _PROBED, np.arange(len(probes)))
    record = json.dumps(step_chart.record(curves), separators=(",", ":"))
    return f'charts.traces["{trial_id}"] = {record};\n'


def _curves(rows: Rows, names: Sequence[str], kept: NDArray[np.intp]) -> dict[str, tuple[str, str]]:
    """The steps and the values of the columns that have one, at these rows; what is not finite stays, null does not."""
    curves = {}
    for name in names:
        values = rows[name] if rows[name].ndim == 1 else _over_layers(rows[name], name)
        there = kept[~rows.is_null(name)[kept]]
        if len(values) and np.isfinite(values[there]).any():
            curves[name] = (packed(rows["step"][there]), packed(values[there]))
    return curves


def _over_layers(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    pick = np.fmin if name in _SMALLEST else np.fmax
    return np.asarray(pick.reduce(values, axis=1)) if values.shape[1] else np.empty(0)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _starts_with(file: Path, head: str) -> bool:
    try:
        with file.open("rb") as f:
            return f.read(len(head)) == head.encode()
    except FileNotFoundError:
        return False


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None
