"""Bad input to a launch: the right exit code, one line for each problem with the key in it, and nothing created.

Every case runs in one process through `sweep.main`. The numbers are the rows of the table of bad inputs and right
behaviour that the project holds itself to.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stabstudy import extras, sweep
from stabstudy.data import sources
from stabstudy.planning import compose, compute, document, overrides
from stabstudy.planning.plan import make_plan
from stabstudy.planning.preview import why_not_here
from stabstudy.settings import ConfigError, Issues, Problem


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every case stands in an empty folder, and must leave it as it was."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def compose_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal files compose equally, so two hundred launches need not compose and hash the same ones again."""
    monkeypatch.setattr(compose, "base", lambda sweep, choices: _base(sweep, tuple(choices.items())))
    monkeypatch.setattr(sources, "fingerprint", functools.cache(FINGERPRINT))


BASE, FINGERPRINT, KNOWN = compose.base, sources.fingerprint, {}


def _base(sweep: document.Document, choices: tuple[tuple[str, str], ...]) -> compose.Base:
    key = (sweep.text, choices)
    if key not in KNOWN:
        KNOWN[key] = BASE(sweep, dict(choices))
    return KNOWN[key]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> list[str]:
    """The error lines of a launch that must be refused, after the checks that hold for all of them."""
    before = files(Path.cwd())
    assert sweep.main([*arguments, "--dry-run"] if code == 2 else list(arguments)) == code
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert lines and all(line.startswith("error: ") for line in lines), said.err
    assert "Traceback" not in said.err
    assert files(Path.cwd()) == before
    return lines


def sweep_file(text: str | bytes, name: str = "own") -> None:
    Path("sweeps").mkdir(exist_ok=True)
    Path("sweeps", f"{name}.yaml").write_bytes(text.encode() if isinstance(text, str) else text)


ONE = ["sweep=quickstart", "seeds=1", "model.depth=2", "optim.clip=1.0", "train.steps=150"]  # known numbers


# One problem, one line: (row, override, what the line must say behind "error: conf: ").
OVERRIDES = [
    (1, "optim.lr=abc", "optim.lr: must be a finite number in [0, 10], got 'abc' (from override 'optim.lr=abc')"),
    (2, "optim.lr=nan", "optim.lr: must be a finite number in [0, 10], got nan (from override 'optim.lr=nan')"),
    (2, "optim.lr=inf", "optim.lr: must be a finite number in [0, 10], got inf"),
    (2, "optim.lr=-1e-3", "optim.lr: must be a finite number in [0, 10], got -0.001"),
    (2, "optim.lr=1e-3,nan", "optim.lr: must be a finite number in [0, 10], got nan"),
    (3, "optim.lr=0", "optim.lr: must be a finite number in (0, 10] (0 only with optim.allow_zero_lr=true"),
    (4, "optim.lr=1e-400", "optim.lr: 1e-400 underflows to 0"),
    (4, "optim.lr=1e-3,1e-400", "optim.lr: 1e-400 underflows to 0"),
    (6, "model.depth=0", "model.depth: must be a whole number in [1, 1e+06], got 0"),
    (6, "model.depth=-3", "model.depth: must be a whole number in [1, 1e+06], got -3"),
    (6, "model.depth=2.5", "model.depth: must be a whole number in [1, 1e+06], got 2.5"),
    (6, "model.depth=1e3", "model.depth: must be a whole number in [1, 1e+06], got 1000.0"),
    (6, "model.depth=10^20", "model.depth: must be a whole number in [1, 1e+06], got '10^20'"),
    (6, "model.depth=100000000000000000000", "model.depth: must be a whole number in [1, 1e+06], got 10000"),
    (6, "model.depth=" + "9" * 5000, "model.depth: "),
    (8, "optim.lrr=3", "optim.lrr: is not a setting (did you mean optim.lr"),
    (8, "model.lr=3", "model.lr: is not a setting (did you mean optim.lr?)"),
    (8, "lr=3", "lr: is not a setting (did you mean optim.lr?)"),
    (8, "+optim.momentum=.9", "optim.momentum: is not a setting"),
    (8, "data.synth_flip_ppm=5", "data.synth_flip_ppm: is not a setting (did you mean data.synthetic.flip_ppm?)"),
    (8, "data.synth_vocab=5,6", "data.synth_vocab: is not a setting (did you mean data.synthetic.vocabulary?)"),
    (8, "data.synthetic=5", "data.synthetic: is not a setting (did you mean data.synthetic."),
    (21, "data.synthetic.bytes=1:30", "data.synthetic.bytes: must be a whole number in [1000, 1e+11], got '1:30'"),
    (
        8,
        "data.synthetic.bytes=5000",
        "data.synthetic.bytes: has an effect with source synthetic only, got source pysrc",
    ),
    (8, "optm=adamw", "optm: is not a setting (did you mean optim"),
    (8, "sweep=quickstrat", "sweep: there is no such sweep (did you mean quickstart?), got 'quickstrat'"),
    (9, "data=pysrk", "data: must name a preset (did you mean pysrc?), got 'pysrk'"),
    (9, "data=pysrc,pysrk", "data: must name a preset (did you mean pysrc?), got 'pysrk'"),
    (
        9,
        "data.source=csv",
        "data.source: must be one of pysrc, synthetic, text, jsonl, parquet, lingua, hf, examples, ",
    ),
    (9, "optim.schedule=cosin", "optim.schedule: must be one of constant, linear, cosine, wsd, inv_sqrt, got 'cosin'"),
    (9, "train.precision=fp8", "train.precision: must be one of fp32, bf16, bf16_stream, fp16, got 'fp8'"),
    (9, "model.init=xavier", "model.init: must be one of lingua, "),
    (10, "model.n_heads=3", "model.dim, model.n_heads: dim must be divisible by n_heads, got 64 and 3"),
    (10, "model.n_kv_heads=3", "model.n_heads, model.n_kv_heads: n_heads must be divisible by n_kv_heads, got 4 and 3"),
    (
        11,
        "optim.warmup_steps=500",
        "optim.warmup_steps, train.steps: the warmup must end within the run, got 500 and 150",
    ),
    (12, "train.steps=0", "train.steps: must be a whole number in [1, 1e+09], got 0"),
    (12, "train.steps=-5", "train.steps: must be a whole number in [1, 1e+09], got -5"),
    (12, "optim.warmup_steps=-1", "optim.warmup_steps: must be a whole number in [0, 1e+09] or null, got -1"),
    (12, "optim.beta1=1", "optim.beta1: must be a finite number in [0, 1), got 1.0"),
    (12, "optim.beta2=-.1", "optim.beta2: must be a finite number in [0, 1), got -0.1"),
    (12, "optim.eps=0", "optim.eps: must be a finite number in (0, 1], got 0.0"),
    (12, "optim.min_lr_ratio=1.5", "optim.min_lr_ratio: must be a finite number in [0, 1], got 1.5"),
    (13, "optim.clip=0", "optim.clip: must be a finite number in (0, 1e+09] or null, got 0.0"),
    (13, "optim.clip=-1", "optim.clip: must be a finite number in (0, 1e+09] or null, got -1.0"),
    (13, "optim.clip=nan", "optim.clip: must be a finite number in (0, 1e+09] or null, got nan"),
    (14, "train.micro_batch_size=3", "train.batch_size, train.micro_batch_size: batch_size must be divisible by"),
    (15, "data.seq_len=10000000", "data.seq_len: must be a whole number in [1, 1.04858e+06], got 10000000"),
    (16, "optim.lr=choice()", "optim.lr: "),
    (16, "data=glob(nothing*)", "data: the axis is empty (from override 'data=glob(nothing*)')"),
    (16, "seeds=[]", "seeds: must be a number of seeds from 1 to 10000, or a list of seeds such as [0, 7], got []"),
    (
        18,
        "optim.lr=range(1,9000)",
        "max_trials: at most 10,000 trials are planned (max_trials=N raises it), got 35,996",
    ),
    (18, "optim.lr=range(0,1e12)", "optim.lr: a range needs a step and at most 10000 values"),
    (18, "optim.lr=range(0,1,1e-9)", "optim.lr: a range needs a step and at most 10000 values"),
    (18, "optim.lr=range(0,1,0)", "optim.lr: a range needs a step and at most 10000 values"),
    (18, "seeds=1000000000000", "seeds: must be a number of seeds from 1 to 10000"),
    (18, "optim.lr={log:[1,2],num:100000000}", "optim.lr: an axis is a list, or {log: [low, high], num: n} with n"),
    (19, "optim.lr=[1e-3]", "optim.lr: must be a finite number in [0, 10], got [0.001]"),
    (19, "optim.lr={a:1}", "optim.lr: an axis is a list, or {log: [low, high], num: n}"),
    (19, "optim.lr={log:[1e-3],num:3}", "optim.lr: an axis is a list, or {log: [low, high], num: n}"),
    (19, "optim.lr={log:[0,1],num:3}", "optim.lr: a logarithmic axis needs 0 < low < high, got [0, 1]"),
    (19, "data=[pysrc]", "data: must name a preset"),
    (19, "optim={lr:1}", "optim: must name a preset"),
    (19, "study=[a]", "study: must be text or null, got ['a']"),
    (19, "study=a,b", "study: takes one value"),
    (19, "compute.retries=1,2", "compute.retries: takes one value"),
    (21, "train.steps=012", "train.steps: must be a whole number in [1, 1e+09], got '012'"),
    (21, "optim.lr=012", "optim.lr: must be a finite number in [0, 10], got '012'"),
    (21, "optim.weight_decay=1:30", "optim.weight_decay: must be a finite number in [0, 1000], got '1:30'"),
    (21, "model.qk_norm=no", "model.qk_norm: must be true or false, got 'no'"),
    (21, "model.qk_norm=1", "model.qk_norm: must be true or false, got 1"),
    (23, "optim.lr=???", "optim.lr: must be set: it is ??? here"),
    (23, "optim.lr=${optim.lr}", "optim.lr: cannot be resolved: "),
    (23, "optim.lr=${optim.nothing}", "optim.lr: cannot be resolved: "),
    (
        24,
        "data.path=${oc.env:HOME}",
        "data.path: only ${oc.env:STABSTUDY_...} and plain references may be interpolated",
    ),
    (
        24,
        "data.path=${oc.env:STABSTUDY_NOWHERE}",
        "data.path: cannot be resolved: ",
    ),
    (24, "data.path=${oc.decode:1}", "data.path: only ${oc.env:STABSTUDY_...} and plain references"),
    (24, "data.path=${hydra:runtime.cwd}", "data.path: only ${oc.env:STABSTUDY_...} and plain references"),
    (25, "optim._target_=os.system", "optim._target_: not allowed: nothing is ever instantiated"),
    (25, "+_target_=os.system", "_target_: not allowed"),
    (25, "+model={_target_:os.system,_args_:[true]}", "model: not allowed"),
    (25, "optim.lr={_partial_:true}", "optim.lr: not allowed"),
    (54, "model.depth", "model.depth: is not an override: write KEY=VALUE"),
    (54, "~optim.clip", "optim.clip: nothing can be deleted; clipping, for one, is switched off by optim.clip=null"),
    (54, "optim@train=adamw", "optim: packages (@) are not supported"),
    (54, "hydra.run.dir=/tmp", "hydra.run.dir: Hydra's own settings have no effect here"),
    (54, "optim.lr=interval(1,2)", "optim.lr: has no values to enumerate: list them, or write {log:[low,high],num:n}"),
    (54, "data.path=a=b", "data.path: is not in Hydra's override grammar: quote a value"),
    (54, "optim\\.lr=1", "optim\\.lr: is not in Hydra's override grammar"),
    (54, "sweep.grid.optim.lr=[1]", "sweep.grid.optim.lr: axes are given as optim.lr=A,B"),
    (54, "+sweep.grid.optim.lr=[1]", "sweep.grid.optim.lr: axes are given as optim.lr=A,B"),
    (54, "sweep.seeds=5", "sweep.seeds: axes are given as optim.lr=A,B, and seeds as seeds=5"),
    (54, "max_trials=0", "max_trials: must be a whole number in [1, 1e+06], got 0"),
    (54, "launcher=slurm", "launcher: must be one of ray, local, got 'slurm'"),
    (27, "results_dir=", "results_dir: must name a folder, got ''"),
    (27, "results_dir='~nobody-here/x'", "results_dir: names the home of an unknown user"),
    (54, "force=maybe", "force: must be true or false, got 'maybe'"),
    (55, "compute.gpus_per_pack=-1", "compute.gpus_per_pack: must be a finite number in [0, 1], got -1.0"),
    (55, "compute.gpus_per_pack=2", "compute.gpus_per_pack: must be a finite number in [0, 1], got 2.0"),
    (55, "compute.gpus_per_trial=1", "compute.gpus_per_trial: is now called compute.gpus_per_pack"),
    (55, "compute.cpus_per_trial=1", "compute.cpus_per_trial: is now called compute.cpus_per_pack"),
    (56, "compute.pack=0", "compute.pack: must be auto or a whole number in [1, 128], got 0"),
    (56, "compute.pack=129", "compute.pack: must be auto or a whole number in [1, 128], got 129"),
    (56, "compute.pack=many", "compute.pack: must be auto or a whole number in [1, 128], got 'many'"),
    (56, "compute.pack=1,2", "compute.pack: takes one value"),
    (56, "compute.max_concurrent=0", "compute.max_concurrent: must be a whole number in [1, 1e+06] or null, got 0"),
    (56, "compute.retries=-1", "compute.retries: must be a whole number in [0, 100], got -1"),
    (56, "compute.hang_timeout=0", "compute.hang_timeout: must be a finite number in (0, 86400], got 0.0"),
    (56, "compute.retry=1", "compute.retry: is not a setting (did you mean compute.retries"),
]


@pytest.mark.parametrize(("row", "override", "line"), OVERRIDES, ids=[f"{r}-{o[:40]}" for r, o, _ in OVERRIDES])
def test_a_bad_override(capsys, row, override, line):
    kept = [a for a in ONE if a.partition("=")[0] != override.partition("=")[0]]
    if override == "optim.lr=range(1,9000)":
        kept = ["seeds=1", "model.depth=2,4", "optim.clip=1.0,null"]
    lines = refused(capsys, *kept, override)
    assert len(lines) == 1 and lines[0].startswith(f"error: conf: {line}"), lines


NAMES = [
    "../../etc",
    "/abs",
    "",
    "x" * 300,
    "a\0b",
    "a\nb",
    "😀",
    "CON",
    "con.txt",
    "com1",
    "-rf",
    ".hidden",
    "a/b",
    "a\\b",
    "a..b",
    "a.",
    "a b",
    "a;b",
    "$(true)",
    "`true`",
    "a|b",
    "a&b",
    "a*",
    "a?",
    "~",
    "nul",
    "%2e%2e",
    "a\tb",
    "\x1b[31m",
    "ünder",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_study_name(capsys, name):
    """Row 27. One line even where the name holds a newline, and nothing that steers a terminal."""
    lines = refused(capsys, *ONE, f"study={name}")
    assert len(lines) == 1 and lines[0].startswith("error: conf: study: "), lines
    assert all(c.isprintable() for c in lines[0])


def test_everything_wrong_is_said_at_once(capsys):
    lines = refused(
        capsys, "optim.lrr=3", "optim.lr=nan", "model.depth=0", "data=c5", "study=../x", "foo", "optim.eps=-1"
    )
    keys = {line.split(": ")[2] for line in lines}
    assert keys == {"optim.lrr", "optim.lr", "model.depth", "data", "study", "foo", "optim.eps"}


def test_many_problems_are_counted_after_twenty(capsys):
    lines = refused(capsys, *(f"optim.x{i}=1" for i in range(50)))
    assert len(lines) == 21 and lines[-1] == "error: and 30 more"


def test_a_problem_of_many_cells_is_said_once(capsys):
    assert len(refused(capsys, "optim.lr=1e-3,1e-2,nan", "model.depth=2,3,4", "seeds=5")) == 1


# sweep files: (row, text, what the line must say behind "error: conf: ")
FILES = [
    (5, 'optim: {lr: "1e-3x"}', "optim.lr: must be a finite number in [0, 10], got '1e-3x' (sweeps/own.yaml:1)"),
    (8, "optim: {lrr: 1}", "optim.lrr: is not a setting (did you mean optim.lr, optim.lr_rule?)"),
    (8, "data: {synth_order: 1}", "data.synth_order: is not a setting (did you mean data.synthetic.order?)"),
    (
        8,
        "sweep: {grid: {data.synth_order: [1]}}",
        "data.synth_order: is not a setting (did you mean data.synthetic.order",
    ),
    (
        8,
        "sweep:\n  exclude: ['data.synth_vocab > 1']",
        "sweep.exclude: data.synth_vocab is not a setting (did you mean data.synthetic.vocabulary?)",
    ),
    (19, "data: {synthetic: 5}", "data.synthetic: must be a mapping of settings, got 5 (sweeps/own.yaml:1)"),
    (19, "data: {synthetic: {order: [1]}}", "data.synthetic.order: must be one value, got [1] (sweeps/own.yaml:1)"),
    (
        19,
        "data: {source: synthetic}\ntrain: {synthetic: {order: 1}}",
        "train.synthetic: must be one value, got {'order': 1}",
    ),
    (8, "optimizer: {lr: 1}", "optimizer: is not a setting (did you mean optim?) (sweeps/own.yaml:1)"),
    (8, "sweep: {grd: {}}", "sweep.grd: is not part of a sweep (did you mean grid?) (sweeps/own.yaml:1)"),
    (8, "sweep: {grid: {optim.lrr: [1]}}", "optim.lrr: is not a setting (did you mean optim.lr"),
    (8, "sweep: {cases: {a: {lr: 1}}}", "lr: is not a setting (did you mean optim.lr?) (sweeps/own.yaml:1)"),
    (8, "sweep:\n  exclude: ['optim.lrr > 1']", "sweep.exclude: optim.lrr is not a setting (did you mean optim.lr"),
    (8, "seed: 3", "seed: write sweep.seeds (sweeps/own.yaml:1)"),
    (8, "sweep: {grid: {seed: [1]}}", "sweep.grid.seed: seeds are replicates, not an axis"),
    (8, "sweep: {grid: {compute.threads: [1, 2]}}", "compute.threads: sets where trials run, not what they train"),
    (8, "sweep: {grid: {optim: {lr: [1, 2]}}}", "optim: an axis is written under its dotted name, optim.lr: [...]"),
    (9, "sweep: {grid: {data: [pysrc, c5]}}", "data: must name a preset"),
    (9, "defaults:\n  - override /data: c5", "data: must name a preset"),
    (9, "defaults: [depth_lr]", "defaults: may only choose presets, each as - override /data: c4, got 'depth_lr'"),
    (9, "defaults: [data: c4]", "defaults: may only choose presets, each as - override /data: c4, got {'data': 'c4'}"),
    (16, "sweep: {grid: {optim.lr: []}}", "optim.lr: the axis is empty (sweeps/own.yaml:1)"),
    (16, "sweep: {seeds: []}", "seeds: must be a number of seeds"),
    (16, "sweep: {zip: [{optim.lr: [], optim.eps: []}]}", "sweep.zip: zipped axes must be lists of one length"),
    (19, "sweep: {grid: {optim.lr: 3e-3}}", "optim.lr: an axis is a list of values, such as [0.003], got 0.003"),
    (19, "sweep: {grid: [1]}", "sweep.grid: must be a mapping, got [1]"),
    (19, "sweep: 3", "sweep: must be a mapping, got 3"),
    (19, "sweep: {seeds: a}", "seeds: must be a number of seeds"),
    (19, "sweep: {zip: {optim.lr: [1]}}", "sweep.zip: must be a list of mappings"),
    (
        19,
        "sweep: {zip: [{optim.lr: [1, 2], optim.eps: [1]}]}",
        "sweep.zip: zipped axes must be lists of one length, got",
    ),
    (19, "sweep: {exclude: 'seed == 1'}", "sweep.exclude: must be a list of conditions, each quoted"),
    (
        19,
        "sweep: {grid: {optim.lr: [1]}, zip: [{optim.lr: [1]}]}",
        "optim.lr: is listed in more than one of sweep.grid and",
    ),
    (19, "optim: 3", "optim: must be a mapping, got 3 (sweeps/own.yaml:1)"),
    (19, "optim: 3\nsweep: {grid: {optim.lr: [1]}}", "optim: must be a mapping, got 3 (sweeps/own.yaml:1)"),
    (19, "- a\n- b", "sweeps/own.yaml:1: must hold a mapping of settings"),
    (20, "optim:\n  lr: 1\n  lr: 2", "sweeps/own.yaml:3: key 'lr' is listed twice (first on line 2)"),
    (20, "sweep: {grid: {optim.lr: [1], optim.lr: [2]}}", "sweeps/own.yaml:1: key 'optim.lr' is listed twice"),
    (21, "model: {qk_norm: no}", "sweeps/own.yaml:1: model.qk_norm: no means a truth value in YAML"),
    (21, "train:\n  steps: 012", "sweeps/own.yaml:2: train.steps: 012 is a number in another base in YAML"),
    (21, "train:\n  steps: 0x10", "sweeps/own.yaml:2: train.steps: 0x10 is a number in another base in YAML"),
    (21, "optim:\n\n  lr: 1:30", "sweeps/own.yaml:3: optim.lr: 1:30 is a number in another base in YAML"),
    (21, "optim: {lr: 1:30.5}", "sweeps/own.yaml:1: optim.lr: 1:30.5 is a number in base 60 in YAML"),
    (21, 'optim: {lr: "012"}', "optim.lr: must be a finite number in [0, 10], got '012'"),
    (21, "no: 1", "sweeps/own.yaml:1: no: no means a truth value in YAML"),
    (4, "optim: {lr: 1e-400}", "sweeps/own.yaml:1: optim.lr: 1e-400 underflows to 0"),
    (22, "optim: {lr: 1", "sweeps/own.yaml:"),
    (22, "optim:\n\tlr: 1", "sweeps/own.yaml:2: is not valid YAML: "),
    (22, "", "sweeps/own.yaml:1: is empty"),
    (22, "# only a comment\n", "sweeps/own.yaml:1: is empty"),
    (22, b"\xef\xbb\xbfoptim: {lr: 1}", "sweeps/own.yaml:1: starts with a byte order mark"),
    (22, b"optim:\n  lr: \xff", "sweeps/own.yaml:2: is not UTF-8, got byte 0xff"),
    (22, "a: 1\n---\nb: 2\n", "sweeps/own.yaml:2: is not valid YAML: "),
    (22, "? [a]\n: 1", "sweeps/own.yaml:1: a key must be text"),
    (23, "optim:\n  lr: ???", "optim.lr: must be set: it is ??? here (sweeps/own.yaml:2)"),
    (23, "optim: {lr: '${optim.eps}', eps: '${optim.lr}'}", "optim"),
    (24, "data: {path: '${oc.env:HOME}'}", "sweeps/own.yaml:1: data.path: only ${oc.env:STABSTUDY_...}"),
    (24, "data: {path: '${oc.env:STABSTUDY_X,/etc}'}", "sweeps/own.yaml:1: data.path: only ${oc.env:STABSTUDY_...}"),
    (24, "data: {path: '${oc.env:${data.source}}'}", "sweeps/own.yaml:1: data.path: only ${oc.env:STABSTUDY_...}"),
    (26, "a: &a [*a]", "sweeps/own.yaml:1: an alias contains itself"),
    (26, "a: [" + "1, " * 10_001 + "1]", "sweeps/own.yaml: holds more than 10000 values"),
    (26, "a: " + "[" * 2000, "sweeps/own.yaml: is nested too deeply"),
    (26, "# " + "x" * 2**20, "sweeps/own.yaml: must be at most 1 MiB"),
]


@pytest.mark.parametrize(("row", "text", "line"), FILES, ids=[f"{r}-{str(t)[:40]}" for r, t, _ in FILES])
def test_a_bad_sweep_file(capsys, row, text, line):
    sweep_file(text)
    lines = refused(capsys, "sweep=own")
    assert len(lines) == 1 and lines[0].startswith(f"error: conf: {line}"), lines


def test_an_alias_bomb_is_not_written_out(capsys):
    """Row 26: nine levels of nine aliases are 387 million values in 400 bytes."""
    levels = ["l0: &l0 [1,1,1,1,1,1,1,1,1]"]
    levels += [f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 9)]
    sweep_file("\n".join(levels))
    assert refused(capsys, "sweep=own") == [
        "error: conf: sweeps/own.yaml: holds more than 10000 values once its aliases are written out"
    ]


TARGETS = [
    "_target_: os.system",
    "optim: {_target_: torch.load}",
    "sweep: {grid: {optim.lr: [{_target_: builtins.open}]}}",
    "sweep: {cases: {a: {_target_: pandas.read_pickle}}}",
    "model: {depth: {_target_: pytest.main, _args_: [x]}}",
    "data: {path: [[[{_partial_: true}]]]}",
    "train: {_convert_: all}",
    "train: {a: {b: {c: {_recursive_: false}}}}",
]


@pytest.mark.parametrize("text", TARGETS)
def test_nothing_is_instantiated(capsys, text):
    """Row 25, at any depth."""
    sweep_file(text)
    lines = refused(capsys, "sweep=own")
    assert all("not allowed: nothing is ever instantiated" in line for line in lines)


def test_python_tags_are_refused(capsys):
    sweep_file("optim: {lr: !!python/object/apply:os.system ['true']}")
    assert refused(capsys, "sweep=own")[0].startswith("error: conf: sweeps/own.yaml: ")


def test_a_secret_in_the_environment_is_not_shown(capsys, monkeypatch):
    monkeypatch.setenv("STABSTUDY_KEY", "canary-7f3a")
    lines = refused(capsys, *ONE, "optim.lr=${oc.env:STABSTUDY_KEY}", "data.path=${oc.env:SECRET}")
    assert "SECRET" in " ".join(lines)


def test_a_depth_that_cannot_fit_is_refused_unless_forced(capsys):
    """Row 7."""
    line = refused(capsys, *ONE, "model.depth=100000", "model.dim=1024", "optim.lr=1e-3")[0]
    assert line.startswith("error: conf: model.depth, model.dim, train.batch_size: a trial must fit into the ")
    assert sweep.main([*ONE, "model.depth=100000", "model.dim=1024", "optim.lr=1e-3", "force=true", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("nowhere.txt", "data.path: must exist"),
        (".", "data.path: the folder holds no *.txt"),
        ("empty.txt", "data.path: holds no text"),
        ("link", "data.path: "),
    ],
)
def test_bad_data_paths(capsys, path, line):
    """Rows 31 and 37: what planning can see of the data."""
    Path("empty.txt").touch()
    Path("inside").mkdir()
    Path("outside.txt").write_text("text\n" * 100)
    Path("inside", "a.txt").symlink_to(Path("outside.txt").resolve())
    if path == ".":
        Path("sub").mkdir()
        path = "sub"
    lines = refused(capsys, *ONE, "optim.lr=1e-3", "data=text", f"data.path={'inside' if path == 'link' else path}")
    assert len(lines) == 1 and lines[0].startswith(f"error: conf: {line}"), lines


# the machine: exit code 4, before anything starts


def test_a_results_folder_that_is_a_file(capsys):
    """Row 28."""
    Path("results").write_text("mine")
    assert refused(capsys, *ONE, code=4)[0].endswith("results: is not a folder")


def test_a_results_folder_that_is_a_link(capsys):
    Path("elsewhere").mkdir()
    Path("results").mkdir()
    Path("results", "quickstart").symlink_to(Path("elsewhere").resolve())
    assert "is a symbolic link" in refused(capsys, *ONE, code=4)[0]


def test_a_results_folder_that_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert refused(capsys, *ONE, code=4)[0].endswith("cannot be written")


@pytest.mark.parametrize("folder", ["a_file", "a_file/below", "/proc/nowhere", "/dev/null", "n" * 300])
def test_a_cache_folder_that_cannot_be_used(capsys, folder):
    Path("a_file").write_text("mine")
    lines = refused(capsys, *ONE, "launcher=local", f"compute.cache_dir={folder}", code=4)
    assert len(lines) == 1
    assert lines[0].startswith("error: machine: compute.cache_dir: must be a folder that can be written (")


def test_a_cache_folder_of_the_environment_that_cannot_be_used(capsys, monkeypatch):
    monkeypatch.setenv("STABSTUDY_CACHE", "/proc/nowhere")
    (line,) = refused(capsys, *ONE, "launcher=local", code=4)
    assert line.startswith(
        "error: machine: $STABSTUDY_CACHE: must be a folder that can be written, got '/proc/nowhere'"
    )


@pytest.mark.parametrize(
    "name",
    [
        "t" * 300,
        "t/" * 2500,
        "./" + "t" * 300,
        "v" * 300 + ".json\\,m",
        "~nobody_of_that_name/x",
        "a/b/c",
        "two words",
        "/dev/null",
    ],
)
def test_a_tokenizer_that_can_be_nowhere(capsys, name):
    (line,) = refused(capsys, *ONE, f"data.tokenizer='{name}'")
    assert line.startswith("error: conf: data.tokenizer: ") and len(line) < 700


def test_a_tokenizer_of_the_hub_without_a_network(capsys, monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("STABSTUDY_CACHE", str(tmp_path.with_name("cache of tokens")))
    assert sweep.main([*ONE, "launcher=local", "data.tokenizer=nobody/nothing"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line == (
        "error: conf: data.tokenizer: cannot be loaded: it is not on this machine, and the hub cannot be reached "
        "(http://127.0.0.1:9: Connection refused), got 'nobody/nothing'"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(capsys, monkeypatch):
    monkeypatch.setattr(compute.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "1 kB free, about " in refused(capsys, *ONE, code=4)[0]


def test_no_gpu(capsys, monkeypatch):
    """Row 55: Ray would leave every trial pending for ever."""
    monkeypatch.setattr(compute, "gpu_memory", lambda: ())
    line = refused(capsys, *ONE, "compute.gpus_per_pack=0.5", code=4)[0]
    assert line == "error: machine: compute.gpus_per_pack=0.5: this machine has no GPU; compute=cpu runs on its cores"


def test_too_few_cores(capsys):
    line = refused(capsys, *ONE, "compute.cpus_per_pack=1000", code=4)[0]
    assert line.startswith("error: machine: compute.cpus_per_pack=1000: this machine has ")


def test_versions(monkeypatch):
    """Row 58."""
    assert compute.why_not_python((3, 10)) == "needs Python 3.11 or newer, this is 3.10"
    assert compute.why_not_python() is None
    with_ray, local = (make_plan([*ONE, f"launcher={launcher}"], Path()) for launcher in ("ray", "local"))
    assert why_not_here(with_ray) == []
    monkeypatch.setattr(extras, "version", lambda name: {"torch": "2.9.1+cpu", "ray": "2.60.0"}.get(name, "1.0"))
    assert why_not_here(with_ray) == ["needs torch 2.10 or newer, found 2.9.1+cpu"]
    monkeypatch.setattr(extras, "FLOORS", {"ray": (3, 0)})
    assert why_not_here(with_ray) == ["needs ray 3.0 or newer, found 2.60.0"]
    assert why_not_here(local) == []


# flags and studies


@pytest.mark.parametrize("flag", ["-rf", "--dryrun", "--multi", "-x", "--", "--cfg", "--config-dir=/tmp"])
def test_unknown_flags(capsys, flag):
    """Row 54."""
    assert sweep.main([flag]) == 2
    assert capsys.readouterr().err.startswith(f"error: conf: {flag}: is not a flag")


@pytest.mark.parametrize("study", ["study=nothing", "results_dir=nowhere", "study=plain"])
def test_status_of_no_study(capsys, study):
    """Row 57."""
    Path("results", "plain").mkdir(parents=True)
    assert sweep.main(["--status", study]) == 2
    assert "is not a study" in capsys.readouterr().err


def test_status_checks_names_too(capsys):
    assert sweep.main(["--status", "study=../../etc"]) == 2
    assert capsys.readouterr().err.startswith("error: conf: study: ")


# whatever is typed, it is never our bug


TYPED = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.builds(
            lambda k, v: f"{k}={v}",
            st.sampled_from(["optim.lr", "model.depth", "data", "study", "seeds", "sweep", "optim", "compute.retries"]),
            st.one_of(st.text(max_size=12), st.integers().map(str), st.floats().map(str)),
        ),
    ).filter(lambda a: a not in ("--list", "--help", "-h", "--version", "--debug")),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TYPED)
def test_fuzzed_launches(given_arguments):
    assert sweep.main([*given_arguments, "--dry-run"]) in (0, 2)


def test_fuzzed_arguments():
    with compose.conf() as loader:

        @given(TYPED)
        def reads(given_arguments):
            found = Issues()
            overrides.read(given_arguments, loader, found)
            assert all(isinstance(p, Problem) for p in found.problems)

        reads()


NAMES_IN_FILES = st.sampled_from(
    ["optim", "model", "data", "compute", "sweep", "defaults", "seed", "hydra", "optim.lr", "data.path", "model.depth",
     "seeds", "grid", "zip", "cases", "exclude", "lr", "depth", "log", "num", "a"]
)  # fmt: skip
SCALARS_IN_FILES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.sampled_from(["pysrc", "${optim.lr}", "seed == 0", ""]),
)
TREES = st.recursive(
    SCALARS_IN_FILES, lambda t: st.lists(t, max_size=3) | st.dictionaries(NAMES_IN_FILES, t, max_size=3), max_leaves=8
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES_IN_FILES, TREES, max_size=4))
def test_fuzzed_sweeps(tree):
    """Any shape of any known key: JSON is YAML."""
    sweep_file(json.dumps(tree))
    assert sweep.main(["sweep=own", "--dry-run"]) in (0, 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.text("abc: -[]{}&*!|>'\"%@`#,?\n\t019.", max_size=60).map(str.encode)))
def test_fuzzed_files(tmp_path, raw):
    path = tmp_path / "x.yaml"
    path.write_bytes(raw)
    try:
        found = document.read(path, "x.yaml")
    except ConfigError as error:
        assert error.problems
    else:
        assert isinstance(found.content, dict)


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        ("${train.steps}", True),
        ("${oc.env:STABSTUDY_A}/x", True),
        ("${oc.env:A}", False),
        ("${ oc.env : A }", False),
        ("${oc.env:STABSTUDY_${a}}", False),
        ("${oc.create:{a:1}}", False),
        ("1e-300", True),
        ("0e-999", True),
        ("-1.5e-999", False),
        ("a1e-999", True),
    ],
)
def test_scalars(text, ok):
    assert (document.scalar_problem(text) is None) is ok


def test_a_config_error_imports_neither_torch_nor_ray(tmp_path):
    code = (
        "import sys; from stabstudy import sweep; code = sweep.main(['optim.lr=nan']); "
        "sys.exit(100 + ('torch' in sys.modules) + ('ray' in sys.modules) if code == 2 else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 100, done.stderr
    assert stat.S_ISDIR(tmp_path.stat().st_mode) and not list(tmp_path.iterdir())
