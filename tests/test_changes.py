"""The changes that CONTRIBUTING.md describes, made on a copy of the package exactly as its blocks say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import planted
import pytest
from conftest import ROOT

from stabstudy.stability.columns import COLUMNS

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KILLED = -9


def section(title: str) -> str:
    """What stands below a heading, up to the next one of any level."""
    return re.split(r"\n#+ ", re.split(rf"\n#+ {title}\n", PAGE, maxsplit=1)[1], maxsplit=1)[0]


def apply(text: str, root: Path) -> list[str]:
    """Make the changes of a section's blocks below `root`; the files touched, each once.

    A block belongs to the path in backticks in the last paragraph that begins with "New file" (python: its content) or
    "In" (diff: an edit, whose old lines stand in the file once).
    """
    touched: dict[str, None] = {}
    where = ""
    pattern = r"^(?:New file|In) `(?P<path>[\w./]+)`|^```(?P<kind>python|diff)\n(?P<body>.*?)^```$"
    for match in re.finditer(pattern, text, flags=re.DOTALL | re.MULTILINE):
        if match["path"]:
            where = match["path"]
            continue
        file = root / where
        if match["kind"] == "python":
            assert not file.exists()
            file.write_text(match["body"])
        else:
            old, new = (sides(match["body"], sign) for sign in "-+")
            before = file.read_text()
            assert before.count(old) == 1, f"{where} has these lines {before.count(old)} times:\n{old}"
            file.write_text(before.replace(old, new))
        touched[where] = None
    return list(touched)


def sides(diff: str, sign: str) -> str:
    """The old (-) or the new (+) text of an edit."""
    lines = diff.splitlines(keepends=True)
    assert all(line[0] in " +-" for line in lines if line != "\n")
    return "".join("\n" if line == "\n" else line[1:] for line in lines if line[0] in f" \n{sign}")


@pytest.mark.parametrize("title", ["An optimizer", "A statistic", "A figure"])
def test_the_blocks_fit_the_code_as_it_is(title: str, copy: Path) -> None:
    touched = apply(section(title), copy)
    assert 2 <= len(touched) <= 3
    for name in touched:
        compile((copy / name).read_text(), name, "exec")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    root = tmp_path / "copy"
    for name in ("stabstudy", "conf", "sweeps", "tests", ".ci"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "data", "faults"))
    shutil.copytree(ROOT / "stabstudy" / "data", root / "stabstudy" / "data", dirs_exist_ok=True)
    shutil.copytree(ROOT / "conf" / "data", root / "conf" / "data", dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "results").mkdir()
    shutil.copy(ROOT / "results" / "README.md", root / "results")
    return root


def run(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, which is the package that it imports."""
    path = os.pathsep.join([str(root), str(ROOT / "tests")])
    environment = {k: v for k, v in os.environ.items() if k != "STABSTUDY_FAILPOINT"}
    return subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", *arguments],
        cwd=root,
        env=environment | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_an_edit_whose_lines_are_gone_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("one\ntwo\n")
    edit = "In `a.py`:\n\n```diff\n one\n-two\n+three\n\n+four\n```\n"
    assert apply(edit.replace("\n\n+four", ""), tmp_path) == ["a.py"]
    assert (tmp_path / "a.py").read_text() == "one\nthree\n"
    with pytest.raises(AssertionError, match="has these lines 0 times"):
        apply(edit, tmp_path)


# an optimizer

TRAINED = (
    *("optim.kind=sgd", "optim.lr=0.1", "optim.schedule=constant", "optim.warmup_steps=3", "model.depth=1"),
    *("data=pysrc", "data.max_bytes=60_000", "data.seq_len=16", "train.batch_size=4", "train.steps=30"),
    *("train.checkpoint_every=10", "train.eval_every=15", "seeds=1", "study=s", "launcher=local"),
)
AGAINST_TORCH = """
import sys
import torch
from stabstudy.config import OptimConfig, TrialConfig
from stabstudy.training.optimizers import optimizer

members = [(0.9, 0.05), (0.2, 0.1), (0.5, 0.01)]
more = {"sgd_nesterov": True} if "nesterov" in sys.argv else {}
optims = [OptimConfig(kind="sgd", lr=lr, weight_decay=0, beta1=beta1, **more) for beta1, lr in members]
configs = [TrialConfig(optim=optim) for optim in optims]
draw = torch.Generator().manual_seed(0)
stack = torch.randn(3, 4, 5, generator=draw)
rows = [row.clone().requires_grad_() for row in stack]
ours = optimizer(configs, [("head.weight", stack)])
theirs = [
    torch.optim.SGD([row], lr=lr, momentum=beta1, nesterov=bool(more)) for row, (beta1, lr) in zip(rows, members)
]
for step in range(6):
    grads = torch.randn(3, 4, 5, generator=draw)
    left_out = torch.tensor([0.0, 0.0, float(step == 2)])
    ours.step([grads], [lr for _, lr in members], left_out)
    for k, (row, other) in enumerate(zip(rows, theirs)):
        row.grad = grads[k]
        if not left_out[k]:
            other.step()
torch.testing.assert_close(stack, torch.stack([row.detach() for row in rows]))
assert not torch.equal(stack[0], stack[1])
"""


@pytest.mark.slow
def test_an_optimizer(copy: Path) -> None:
    touched = apply(section("An optimizer"), copy)
    assert touched == ["stabstudy/training/sgd.py", "stabstudy/training/optimizers.py", "stabstudy/config.py"]
    done = run(copy, "-c", AGAINST_TORCH)
    assert done.returncode == 0, done.stderr

    sweep = ("-m", "stabstudy.sweep", *TRAINED, f"compute.cache_dir={copy / 'cache'}")
    whole = run(copy, *sweep, "results_dir=whole")
    assert whole.returncode == 0, whole.stderr
    killed = run(copy, *sweep, "results_dir=parts", STABSTUDY_FAILPOINT="checkpoint.durable:kill@2")
    assert killed.returncode == KILLED
    (trial,) = (copy / "parts" / "s" / "trials").iterdir()
    assert [c.name for c in sorted((trial / "checkpoint").iterdir())] == ["step-00000010", "step-00000020"]
    resumed = run(copy, *sweep, "results_dir=parts")
    assert resumed.returncode == 0, resumed.stderr
    one, two = (
        json.loads((copy / d / "s" / "trials" / trial.name / "state.json").read_text()) for d in ("whole", "parts")
    )
    assert two["attempts"][-1]["from_step"] == 20 and two["records"]["trace"]["rows"] == 30
    for record in ("trace", "probes"):
        assert one["records"][record]["values_sha256"] == two["records"][record]["values_sha256"]
    assert two["final_loss"] < two["init_loss"]


@pytest.mark.slow
def test_a_setting_of_an_optimizer(copy: Path) -> None:
    apply(section("An optimizer"), copy)
    touched = apply(section("A setting of its own"), copy)
    assert touched == [
        "stabstudy/config.py",
        "conf/optim/adamw.yaml",
        "stabstudy/shape.py",
        "stabstudy/training/sgd.py",
    ]
    done = run(copy, "-c", AGAINST_TORCH, "nesterov")
    assert done.returncode == 0, done.stderr
    ids = "from stabstudy.config import TrialConfig, trial_id; print(trial_id(TrialConfig(), 'f' * 16))"
    assert run(copy, "-c", ids).stdout == run(ROOT, "-c", ids).stdout != ""  # no finished trial has another name
    refused = run(copy, "-m", "stabstudy.sweep", "optim.sgd_nesterov=true", "study=s")
    assert refused.returncode == 2 and "optim.sgd_nesterov: has an effect with kind sgd only" in refused.stderr
    rules = "placed_once or sgd_nesterov or every_setting_stands_in_conf"
    kept = run(copy, "-m", "pytest", "-n", "0", "tests/test_shape.py", "tests/test_conf.py", "-k", rules)
    assert kept.returncode == 0, kept.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "titles", [["An optimizer"], ["An optimizer", "A setting of its own"], ["A statistic"], ["A figure"]], ids=str
)
def test_the_house_stands_after_a_change(titles: list[str], copy: Path) -> None:
    for title in titles:
        apply(section(title), copy)
    rules = ("nobody_imports_who_it_may_not", "modules_are_few", "modules_are_small", "no_module_name_stands_twice")
    kept = run(copy, "-m", "pytest", "-n", "0", *(f"tests/test_layers.py::test_{rule}" for rule in rules))
    assert kept.returncode == 0, kept.stdout
    clean = run(copy, "-m", "ruff", "check", "stabstudy") if find_spec("ruff") else kept
    assert clean.returncode == 0, clean.stdout


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["optim.eps=1e-6", "optim.beta2=0.99", "optim.muon_momentum=0.9"])
def test_a_setting_of_another_optimizer_is_refused(copy: Path, setting: str) -> None:
    apply(section("An optimizer"), copy)
    done = run(copy, "-m", "stabstudy.sweep", *TRAINED, setting)
    assert done.returncode == 2 and not (copy / "results" / "s").exists()
    assert re.search(rf"{re.escape(setting.partition('=')[0])}: has an effect with kinds? ", done.stderr)


@pytest.mark.slow
def test_a_momentum_that_is_no_number_is_damage(copy: Path) -> None:
    """The check of checkpoints knows the state of a new optimizer without being told."""
    apply(section("An optimizer"), copy)
    code = (
        "import pytest, torch\nfrom pathlib import Path\nfrom stabstudy.training import checkpoint\n"
        "bad = {'sgd/head.weight': torch.tensor([float('nan')])}\n"
        "checkpoint.save(Path('c'), 't', bad, 3)\n"
        "checkpoint.restore(Path('c'), 't', {'sgd/head.weight': torch.Size([1])}, 9)\n"
    )
    assert "CheckpointError: nonfinite checkpoint step-00000003: sgd/head.weight" in run(copy, "-c", code).stderr


def few_trials(study: Path) -> Path:
    """Four trials of the committed study, as they judged themselves."""
    example = ROOT / "results" / "example"
    study.mkdir()
    for name in ("sweep.yaml", "provenance.json"):
        shutil.copy(example / name, study)
    for trial in sorted((example / "trials").iterdir())[:4]:
        shutil.copytree(trial, study / "trials" / trial.name)
    return study


# a statistic


@pytest.mark.slow
def test_a_statistic(copy: Path, tmp_path: Path) -> None:
    touched = apply(section("A statistic"), copy)
    assert touched == [f"stabstudy/stability/{name}.py" for name in ("statistics", "columns")]
    documented = run(copy, ".ci/columns.py")
    assert documented.returncode == 0, documented.stderr
    assert "| `loss_rise_share` | number | fraction |" in (copy / "results" / "README.md").read_text()

    study = few_trials(tmp_path / "s")
    written = run(copy, "-m", "stabstudy.report", str(study))
    assert written.returncode == 0, written.stderr
    table = pd.read_parquet(study / "trials.parquet").set_index("trial_id")
    for trial, share in table["loss_rise_share"].items():
        loss = pd.read_parquet(study / "trials" / str(trial) / "trace.parquet")["loss"]
        assert share == pytest.approx((loss.diff().dropna() > 0).mean()) and 0 < share < 1
    assert "loss_rise_share" in (study / "report" / "trials.csv").read_text().splitlines()[0]
    assert "loss_rise_share" not in COLUMNS  # the copy alone was changed


# a figure


@pytest.mark.slow
def test_a_figure(copy: Path, tmp_path: Path) -> None:
    touched = apply(section("A figure"), copy)
    assert touched == [f"stabstudy/analysis/figures/{name}.py" for name in ("loss_severity", "registry")]
    study = few_trials(tmp_path / "s")
    written = run(copy, "-m", "stabstudy.report", str(study))
    assert written.returncode == 0, written.stderr
    page, text = (study / "report" / "index.html").read_text(), (study / "report" / "report.md").read_text()
    assert "Final loss against severity" in page and "severity is 0 where no step was absolute" in page
    assert "Final loss against severity" in text
    assert (study / "report" / "figures" / "loss-severity.svg").read_text().startswith("<?xml")
    losses = pd.read_parquet(study / "trials.parquet").set_index("trial_id")["final_loss"]
    part = text.split("### Final loss against severity")[1].split("\n### ")[0]
    numbers = dict(re.findall(r"^\| \[(\w{10})\]\(\S+\) \|[^|]*\| ([\d.]+) \|$", part, re.MULTILINE))
    assert numbers == {trial: f"{loss:.2f}" for trial, loss in losses.items()} and len(numbers) == 4


@pytest.mark.slow
def test_a_figure_that_a_study_does_not_allow_says_why(copy: Path, tmp_path: Path) -> None:
    apply(section("A figure"), copy)
    study = tmp_path / "s"
    planted.plant_trial(study, planted.settings(lr=1e-3))
    planted.plant_trial(study, planted.settings(lr=1e-2), status="failed", steps_done=60)
    assert run(copy, "-m", "stabstudy.report", str(study)).returncode == 0
    assert "fewer than two done trials have both" in (study / "report" / "report.md").read_text()
