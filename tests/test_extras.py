"""What the program does with only some of its packages: each extra is one, and a missing one is one line, code 4.

Here every package is installed. A process without an extra is made by hiding what is not in the closure of the
requirements of what it has: its modules cannot be imported, and its distribution is not there.
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from pathlib import Path

import logs
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_study_statistics import AXES, full_grid

from stabstudy import extras
from stabstudy.analysis.study_statistics import importance

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

HIDE = """\
import sys
from importlib import metadata

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
of_all = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.lower().replace("_", "-") in {distributions!r}:
        raise metadata.PackageNotFoundError(name)
    return of_all(cls, name)

metadata.Distribution.from_name = classmethod(from_name)
"""
TINY = [
    "data=synthetic", "data.synthetic.bytes=15000", "data.seq_len=16", "model.dim=16", "model.n_heads=2",
    "model.depth=2", "train.batch_size=4", "train.steps=30", "optim.warmup_steps=3", "train.eval_sequences=8",
    "optim.lr=1e-3,1e-2", "study=tiny", "seeds=1",
]  # fmt: skip

Run = Callable[..., subprocess.CompletedProcess[str]]


@cache
def needed(requirement: str) -> frozenset[str]:
    """The distributions that the requirement installs here, itself among them."""
    todo, done = [Requirement(requirement)], {}
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in done:
            continue
        done[(name, *sorted(wanted.extras))] = name
        for line in metadata.requires(name) or ():
            inner = Requirement(line)
            if any(inner.marker is None or inner.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                todo.append(inner)
    return frozenset(done.values())


def closure(parts: Iterable[str]) -> frozenset[str]:
    """The distributions of `pip install stabstudy[parts]`."""
    lines = [*PROJECT["dependencies"]]
    for part in parts:
        lines += PROJECT["optional-dependencies"][part]
    return frozenset().union({"stabstudy"}, *map(needed, lines))


def hidden(kept: Iterable[str]) -> str:
    """The file that hides every distribution but these."""
    left = {canonicalize_name(name) for name in kept}
    modules = {
        module
        for module, names in metadata.packages_distributions().items()
        if not left & {canonicalize_name(name) for name in names}
    }
    every = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    return HIDE.format(modules=modules, distributions=every - left)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python, and every process that it starts, with the base and these extras, in an empty folder."""

    def python(parts: Iterable[str], *arguments: str) -> subprocess.CompletedProcess[str]:
        site, folder = tmp_path / "site", tmp_path / "here"
        for made in (site, folder):
            made.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(hidden(closure(parts)))
        environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "STABSTUDY_CACHE": str(tmp_path / "c")}
        return subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False
        )

    return python


def sweep(run: Run, parts: Iterable[str], *words: str) -> subprocess.CompletedProcess[str]:
    return run(parts, "-m", "stabstudy.sweep", *words)


def created(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "here").rglob("*")]


# what is hidden is hidden


def test_packages_are_hidden_also_in_child_processes(run: Run):
    names = [
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "ray",
        "optuna",
        "sklearn",
        "datasets",
        "tensorboard",
    ]
    code = (
        "import importlib, subprocess, sys\n"
        f"for name in {names!r}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError:\n"
        "        continue\n"
        "    print(name)\n"
        "if sys.argv[1:]:\n"
        "    print('child'); sys.stdout.flush(); subprocess.run([sys.executable, '-c', sys.argv[1]])\n"
    )
    assert run([], "-c", code, code).stdout.split() == ["child"]
    assert run(["search"], "-c", code).stdout.split() == ["optuna", "sklearn"]
    assert run(["all"], "-c", "import torch, ray, optuna").returncode == 1, "an extra of extras is not followed"


def test_distributions_are_hidden(run: Run):
    code = "from stabstudy import extras; print([extras.installed(p) == 'none' for p in ('torch', 'ray', 'numpy')])"
    assert run([], "-c", code).stdout.strip() == "[True, True, False]"
    assert run(["train"], "-c", code).stdout.strip() == "[False, True, False]"


def test_no_extra_is_needed_by_the_base():
    for part in ("train", "ray", "search", "hf", "tensorboard"):
        assert not closure([]) & set(extras.EXTRAS[part]), part
    assert "ray" not in closure(["train", "search"]) and "torch" not in closure(["ray", "search"])


# the lines of pyproject.toml, and those that a user sees


def listed(part: str) -> list[Requirement]:
    return [Requirement(line) for line in PROJECT["optional-dependencies"][part]]


def test_extras_are_those_of_the_package():
    for part, packages in extras.EXTRAS.items():
        assert {r.name for r in listed(part)} == set(packages)
    (everything,) = listed("all")
    assert everything.name == "stabstudy" and everything.extras == set(extras.EXTRAS) - {"wandb"}
    assert "stabstudy[all]" in PROJECT["optional-dependencies"]["test"]


def test_floors_are_those_of_the_package():
    floors = {r.name: str(r.specifier) for part in extras.EXTRAS for r in listed(part)}
    assert floors["torch"] == ">=2.10" and extras.FLOORS["torch"] == (2, 10)
    assert floors["ray"] == ">=2.59" and extras.FLOORS["ray"] == (2, 59)
    assert floors["datasets"] == ">=4.8" and extras.FLOORS["datasets"] == (4, 0), "4.0 is safe, 4.8 passes the tests"


def test_one_line_for_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    have = {"torch": "2.9.1+cpu", "safetensors": "0.5.3"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(extras, "version", version)
    assert extras.why_not(["safetensors"]) == []
    assert extras.why_not(["torch", "optuna", "ray"]) == [
        "needs optuna and ray, not installed here: pip install 'stabstudy[ray,search]'",
        "needs torch 2.10 or newer, found 2.9.1+cpu",
    ]


def test_readme_installs_what_its_command_needs():
    text = (ROOT / "README.md").read_text()
    assert 'pip install -e ".[all]" && python -m stabstudy.sweep\n' in text
    assert 'pip install -e ".[test]" && pytest\n' in text


# the base: planning, ingest, report


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--version"], 0), (["--list"], 0), (["--status"], 2), (["optim.lr=nan", "model.dept=1"], 2)],
)
def test_base_answers(run: Run, words: list[str], code: int):
    done = sweep(run, [], *words)
    assert done.returncode == code and "Traceback" not in done.stderr
    if words[0] == "optim.lr=nan":
        assert "conf: model.dept" in done.stderr and "install" not in done.stderr


NEEDS = "needs torch and safetensors and ray, not installed here: pip install 'stabstudy[train,ray]'"


def test_base_plans(run: Run, tmp_path: Path):
    done = sweep(run, [], "--dry-run")
    assert done.returncode == 0 and done.stderr == ""
    assert "36 trials of 12 cells" in done.stdout
    assert f"this machine cannot start it: {NEEDS}\n" in done.stdout
    assert created(tmp_path) == []


def test_base_says_what_training_needs(run: Run, tmp_path: Path):
    done = sweep(run, [])
    assert (done.returncode, done.stderr) == (4, f"error: machine: {NEEDS}\n")
    local = sweep(run, [], "launcher=local")
    assert local.stderr == (
        "error: machine: needs torch and safetensors, not installed here: pip install 'stabstudy[train]'\n"
    )
    assert created(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["data=c4", "data.max_bytes=1000000"], "pip install 'stabstudy[train,ray,hf]'"),
        (["data=synthetic", "data.tokenizer=gpt2"], "torch and safetensors and ray and tokenizers and transformers"),
        (["model.family=llama"], "torch and safetensors and ray and transformers"),
    ],
)
def test_base_plans_what_takes_more(run: Run, tmp_path: Path, words: list[str], missing: str):
    planned = sweep(run, [], *words, "--dry-run")
    assert planned.returncode == 0 and missing in planned.stdout, planned.stderr
    launched = sweep(run, [], *words)
    errors = [line for line in launched.stderr.splitlines() if not line.startswith("warning: ")]
    assert launched.returncode == 4 and len(errors) == 1 and missing in errors[0]
    assert created(tmp_path) == []


def test_base_reads_compressed_text(run: Run, tmp_path: Path):
    import zstandard

    text = b"".join(b'{"text": "%d green bottles"}\n' % i for i in range(2000))
    (tmp_path / "text.jsonl.zst").write_bytes(zstandard.compress(text))
    done = sweep(run, [], "data.source=jsonl", f"data.path={tmp_path / 'text.jsonl.zst'}", "--dry-run")
    assert done.returncode == 0, done.stderr


def test_base_ingests_and_reports(run: Run, tmp_path: Path):
    for seed in range(2):
        logs.trainer_state(tmp_path / "runs" / str(seed), logs.history(logs.norms(300, {150: 20.0}, seed)))
    done = run([], "-m", "stabstudy.ingest", str(tmp_path / "runs"), "--study", "theirs")
    assert done.returncode == 0, done.stderr
    done = run([], "-m", "stabstudy.report", "results/theirs")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "here" / "results" / "theirs" / "report" / "index.html").stat().st_size > 10_000


HINT = "needs optuna and scikit-learn, not installed here: pip install 'stabstudy[search]'"


def test_shares_of_variance_without_search(monkeypatch: pytest.MonkeyPatch):
    """Where the forest would have been asked, the reason; where not, the reason that it has anyway."""
    table = full_grid()
    whole = importance(table, AXES).set_index("metric")
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(extras, "installed", lambda package: "none")
    without = importance(table, AXES).set_index("metric")
    given = whole["reason"].isna()
    assert given.any() and not given.all(), "both kinds must be there"
    assert set(without.loc[given, "reason"]) == {HINT} and without.loc[given, AXES].isna().all(axis=None)
    pd.testing.assert_frame_equal(without.loc[~given], whole.loc[~given], check_dtype=False)
    assert without["p"].equals(whole["p"])


@pytest.mark.slow
def test_report_without_search_says_what_is_absent(run: Run, tmp_path: Path):
    """The example's report has shares of variance; without optuna all else is there."""
    done = run([], "-m", "stabstudy.report", str(ROOT / "results" / "example"), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    page = html.unescape((tmp_path / "out" / "index.html").read_text())
    whole = html.unescape((ROOT / "results" / "example" / "report" / "index.html").read_text())
    assert f"not computed ({HINT})." in page and "pip install" not in whole
    assert page.count("<h2") == whole.count("<h2") and page.count("<img") == whole.count("<img")


# training


def test_train_needs_no_ray(run: Run, tmp_path: Path):
    refused = sweep(run, ["train"], *TINY)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (
        4,
        "error: machine: needs ray, not installed here: pip install 'stabstudy[ray]'",
    )
    assert created(tmp_path) == []
    done = sweep(run, ["train"], *TINY, "launcher=local")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "results" / "tiny" / "report" / "index.html").exists()


TRAIN = """\
import sys
from pathlib import Path
from stabstudy import store
from stabstudy.stability.rules import Rules
from stabstudy.training.pack import run_pack
from stabstudy.training.trial import Engine
(state,) = run_pack([store.TrialFolder(Path(sys.argv[1]))], Engine(Path(sys.argv[2])), Rules(), lambda progress: False)
print(state.status)
"""


def test_trials_train_without_planning_and_tables(make: Callable[..., object], tmp_path: Path):
    from trials import BASE

    folder = make(BASE)
    absent = {"ray", "optuna", "pandas", "matplotlib", "statsmodels", "jinja2", "rich", "transformers", "loky"}
    absent |= {"hydra", "omegaconf", "yaml", "sklearn", "tokenizers", "datasets", "zstandard"}
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(modules=absent, distributions=absent))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", TRAIN, str(folder.path), str(tmp_path / "cache")]  # type: ignore[attr-defined]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["done"], re.sub(r"\s+", " ", done.stderr)[-2000:]
