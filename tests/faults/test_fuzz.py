"""Fuzzed words and sweep files, planned in this process: an answer and its exit code, whatever they are."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.campaign import Part
from faults.children import files
from faults.mutations import at_most, little_memory, mutated
from stabstudy import config as cfg
from stabstudy import sweep
from stabstudy.data import sources
from stabstudy.planning import compose

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
NAMES = [*cfg.flat(cfg.TrialConfig()), "model", "data", "optim", "train", "compute", "sweep", "study", "results_dir"]
NAMES += [
    *("seeds", "launcher", "max_trials", "force", "compute.pack", "compute.retries", "compute.gpus_per_pack"),
    *("compute.address", "compute.cache_dir", "compute.hang_timeout", "sweep.grid", "hydra.run.dir", "_target_"),
]
IN_SWEEP = ["seeds", "grid", "zip", "cases", "exclude", "budget"]
VALUES = [
    *(
        "1",
        "2",
        "0",
        "-1",
        "1e-3",
        "0.5",
        "64",
        "1e400",
        "1e-400",
        "nan",
        "inf",
        "-inf",
        "1_000",
        "0x10",
        "012",
        "1:30",
    ),
    *("99999999999999999999", "true", "no", "null", "None", "", "''", '"', "[", "]", "{", "}", "[1,2]", "{a:1}", "a"),
    *("1e-3,1e-2", "2,4,2", "1,,2", "range(1,4)", "range(1,1e12)", "range(4,1,-1)", "choice(1,2)", "interval(0,1)"),
    *("glob(*)", "glob([a,b])", "glob(", "{log:[1e-4,1e-2],num:3}", "{log:[0,1],num:3}", "{lin:[0,1],num:-1}"),
    *("${optim.lr}", "${oc.env:HOME}", "${", "${a", "../../etc", "/", "/proc/self/mem", "CON", "a/b", "a\nb", "a\tb"),
    *(
        "é",
        "\u202e",
        "\x1b[31m",
        "😀",
        "a" * 64,
        "a" * 300,
        "x" * 5000,
        "pysrc",
        "synthetic",
        "lingua",
        "cosine",
        "bf16",
    ),
    *("adamw", "muon", "llama", "tiny", "norm", "zclip", "sft", "kto", "fp16", "ray", "local", "auto", "quickstart"),
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing may be made in it. Equal files compose and hash equally, so they do it once."""
    known: dict[Any, Any] = {}
    base = compose.base

    def once(document: Any, choices: dict[str, str]) -> Any:
        key = (document.text, tuple(choices.items()))
        if key not in known:
            known.clear() if len(known) > 200 else None
            known[key] = base(document, choices)
        return known[key]

    monkeypatch.setattr(compose, "base", once)
    monkeypatch.setattr(sources, "fingerprint", functools.cache(sources.fingerprint))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_planning(words: list[str], before: dict[str, bytes]) -> list[str]:
    """What is wrong with the answer to a launch that starts nothing."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with at_most(30), little_memory(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = sweep.main([*words, "--dry-run"])
    except BaseException as error:
        return [f"{type(error).__name__}: {error}"[:300]]
    lines = err.getvalue().splitlines()
    broken = [] if code in (0, 2, 4) else [f"exit {code}: {lines[-1] if lines else ''}"[:300]]
    broken += ["a traceback"] if "Traceback" in err.getvalue() else []
    broken += ["refused without a word"] if code and not any(line.startswith("error: ") for line in lines) else []
    broken += ["a control character"] if any(c in err.getvalue() for c in "\x1b\x00\u202e") else []
    return broken + (["something was written"] if files(Path.cwd()) != before else [])


def word(rng: random.Random) -> str:
    name, value = rng.choice(NAMES), rng.choice(VALUES)
    if rng.random() < 0.2:
        value = f"{value}{rng.choice([',', '', ' ', '=', '-'])}{rng.choice(VALUES)}"
    text = f"{rng.choice(['', '', '', '', '+', '++', '~'])}{name}={value}"
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        text = mutated(text.encode() or b"a", rng)[1].decode(errors="replace") or "="
    return text


def usable(words: list[str]) -> bool:
    """Not a flag that does something else."""
    return all(not w.startswith("-") and "\0" not in w for w in words)


def test_overrides(part: Begin, empty_folder: Path) -> None:
    with part("overrides") as running:
        for rng in running.injections():
            words = [word(rng) for _ in range(rng.choice([1, 1, 2, 3, 5]))]
            if rng.random() < 0.5:
                words.insert(0, "sweep=quickstart")
            if not usable(words):
                running.count(False)
                continue
            running.add([f"{words!r}"[:300] + f": {line}" for line in of_planning(words, {})])


def tree(rng: random.Random, depth: int) -> Any:
    """A value of a sweep file."""
    kind = rng.choice(["scalar", "scalar", "list", "mapping"]) if depth else "scalar"
    if kind == "list":
        return [tree(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    if kind == "mapping":
        return {key(rng): tree(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    scalars = [None, True, 0, -1, 3, 1e-3, 1e400, *VALUES[:60], "seed == 0", "optim.lr > 1e-3 and model.depth == 2"]
    return rng.choice(scalars)


def key(rng: random.Random) -> str:
    inner = [*IN_SWEEP, "log", "num", "defaults", "frontier", "search", "stop", "a"]
    return rng.choice([*NAMES, *inner, *inner])


def generated(rng: random.Random) -> bytes:
    body = {name: tree(rng, 3) for name in rng.sample(IN_SWEEP, rng.randint(1, 4))}
    whole: dict[str, Any] = {"sweep": body} | {key(rng): tree(rng, 2) for _ in range(rng.randint(0, 2))}
    return b"# @package _global_\n# Is it a sweep?\n" + json.dumps(whole).encode()


def test_sweep_files(part: Begin, empty_folder: Path) -> None:
    shipped = [path.read_bytes() for path in sorted((compose.conf_folder().parent / "sweeps").glob("*.yaml"))]
    assert len(shipped) > 4
    (empty_folder / "sweeps").mkdir()
    with part("sweep files") as running:
        for rng in running.injections():
            text = generated(rng) if rng.random() < 0.4 else rng.choice(shipped)
            label = "as generated"
            for _ in range(rng.choice([0, 1, 1, 2, 4])):
                label, text = mutated(text or b"sweep:", rng)
            (empty_folder / "sweeps" / "own.yaml").write_bytes(text)
            before = {"sweeps/own.yaml": text}
            running.add([f"{label}: {text!r}"[:300] + f": {line}" for line in of_planning(["sweep=own"], before)])
