"""The committed study: readable by this version, small, and its page is what this version writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from stabstudy.analysis.report.markdown import markdown
from stabstudy.analysis.report.study_page import report
from stabstudy.analysis.study import Study
from stabstudy.planning.plan import make_plan

EXAMPLE = ROOT / "results" / "example"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A copy without tables and judgements, so that every statistic is computed from the trials' own records."""
    copy = tmp_path_factory.mktemp("committed") / "example"
    shutil.copytree(
        EXAMPLE, copy, ignore=shutil.ignore_patterns("trials.parquet", "spikes.parquet", "summary.json", "report")
    )
    return Study.load(copy)


def test_it_holds_every_trial_of_its_sweep(study: Study, tmp_path: Path) -> None:
    plan = make_plan(["sweep=example"], tmp_path)
    assert not study.damaged and set(study.trials["state"]) == {"done"}
    assert len(study.trials) == len(plan.trials) == 27
    assert study.question == plan.question
    assert study.axes == {
        "model.qk_norm": [False, True],
        "optim.lr": [3e-3, 1e-2, 3e-2, 1e-1],
        "optim.clip": [0.2, 1.0],
    }


def test_the_tables_are_those_of_this_version(study: Study) -> None:
    committed = Study.load(EXAMPLE)
    assert committed.tables.computed == 0  # else: `python -m stabstudy.report results/example`, and commit
    assert study.tables.computed == 27
    pd.testing.assert_frame_equal(study.trials, committed.trials, rtol=1e-9)


def test_the_page_is_what_this_version_writes(study: Study) -> None:
    assert markdown(report(study)) == (EXAMPLE / "report" / "report.md").read_text()


def test_qk_norm_keeps_attention_logits_down(study: Study) -> None:
    """METRICS section 9's cleanest effect: fiftyfold and more at learning rate .1."""
    largest = study.trials[study.trials["optim.lr"] == 0.1]
    on = largest["model.qk_norm"]
    assert largest.loc[~on, "attn_logit_peak"].min() > 50 * largest.loc[on, "attn_logit_peak"].max()


def test_it_stays_small() -> None:
    """1.65 MB: of these 90 kB are the judgements that its 27 trials keep of themselves."""
    listed = subprocess.run(["git", "ls-files", EXAMPLE], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / line for line in listed.stdout.splitlines()]
    if not files:
        pytest.skip("not in a git checkout")
    assert sum(f.stat().st_size for f in files) < 1_650_000
