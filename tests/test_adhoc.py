"""Launches with settings and no sweep: what they start from, what their study is called, how it grows."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy import config as cfg
from stabstudy import store, sweep
from stabstudy.config import TrialConfig
from stabstudy.planning import overrides
from stabstudy.planning.plan import Plan, make_plan
from stabstudy.planning.sweepfile import PRIMARY
from stabstudy.settings import ConfigError, Issues


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name(*words: str) -> str:
    """The study's name, as `--status` works it out: without a plan."""
    return overrides.read(list(words), None, Issues()).study


def planned(*words: str) -> Plan:
    return make_plan(list(words), Path.cwd())


def written(plan: Plan) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    (plan.folder / "sweep.yaml").write_text(plan.sweep_text)


# what it starts from


@pytest.mark.parametrize(
    "words", [[], ["seeds=5"], ["seed=3"], ["study=mine"], ["launcher=local", "compute.threads=2"]]
)
def test_without_a_setting_it_is_quickstart(words: list[str]) -> None:
    plan = planned(*words)
    assert plan.start is None and {a.name for a in plan.axes} == {"model.depth", "optim.lr", "optim.clip"}
    assert plan.question.startswith("How rough does training get")


@pytest.mark.parametrize(
    "words", [["optim.lr=1e-3"], ["optim.lr=1e-3,1e-2"], ["data=synthetic"], ["model=tiny,small"], ["train.steps=70"]]
)
def test_any_setting_makes_it_the_users_own(words: list[str]) -> None:
    plan = planned(*words)
    assert re.fullmatch("adhoc-[0-9a-f]{8}", plan.study) and plan.start is not None
    assert [a.name for a in plan.axes] == [w.partition("=")[0] for w in words if "," in w], "no axis of quickstart"
    assert [t.config.seed for t in plan.trials] == [s for s in (0, 1, 2) for _ in range(len(plan.trials) // 3)]


def test_all_else_is_the_default() -> None:
    (trial,) = planned("optim.lr=0.01", "seeds=1").trials
    assert trial.config == dataclasses.replace(TrialConfig(), optim=dataclasses.replace(TrialConfig().optim, lr=0.01))
    assert trial.choices == {"model": "tiny", "optim": "adamw", "objective": "lm", "data": "pysrc", "train": "short"}


def test_questions() -> None:
    assert planned("optim.lr=1e-3").question == "How stable is this one recipe?"
    assert planned("optim.lr=1e-3,1e-2", "model.depth=1,2").question == "What do learning rate and depth change?"


def test_quickstarts_own_settings_are_one_word_away() -> None:
    plan = planned("sweep=quickstart", "optim.lr=1e-3")
    assert (plan.study, plan.start) == ("quickstart", None) and plan.trials[0].config.data.seq_len == 32
    assert plan.trials[0].trial_id != planned("optim.lr=1e-3").trials[0].trial_id


def test_the_first_line_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["optim.lr=1e-3,1e-2", "data=synthetic,pysrc", "--dry-run"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    study = name("optim.lr=1e-3,1e-2", "data=synthetic,pysrc")
    assert first == (
        f"{study} starts from conf/trial.yaml alone (model=tiny, optim=adamw, objective=lm, train=short), "
        "not from a sweep; study=NAME names the study, so that values can be added later"
    )
    assert second == f"{study}: What do learning rate and dataset change?"
    assert sweep.main(["optim.lr=1e-3", "study=mine", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        "mine starts from conf/trial.yaml alone (model=tiny, optim=adamw, objective=lm, data=pysrc, train=short), "
        "not from a sweep"
    )
    assert sweep.main(["--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("quickstart: How rough")


def test_an_error_names_the_file_it_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["model.n_heads=3", "optim.lrr=1", "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "from override 'model.n_heads=3'" in lines[1]


# its name


SAME = [
    ("optim.lr=1e-3,1e-2", "optim.lr=0.01,0.001"),
    ("optim.lr=1e-3,1e-2", "optim.lr=choice(1e-3,1e-2)"),
    ("optim.lr=1", "optim.lr=1.0"),
    ("optim.lr=1e-3", "optim.lr=choice(1e-3)"),
    ("optim.lr=1,2,3", "optim.lr=range(1,4)"),
    ("optim.lr=1e-3", "+optim.lr=0.001"),
    ("optim.clip=null", "optim.clip=null"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_one_request_has_one_name(one: str, other: str) -> None:
    assert name(one, "model.depth=2") == name("model.depth=2", other)


@pytest.mark.parametrize(
    "more",
    ["seeds=7", "seed=4", "results_dir=there", "launcher=local", "compute=gpu", "compute.threads=2", "force=true"],
)
def test_what_is_no_part_of_the_question_is_no_part_of_the_name(more: str) -> None:
    assert name("optim.lr=1e-3", more) == name("optim.lr=1e-3")


@pytest.mark.parametrize(
    "other", ["optim.lr=1e-4", "optim.lr=1e-3,1e-4", "optim.eps=1e-3", "optim.lr=1e-3 model.depth=2", "data=c4"]
)
def test_other_requests_have_other_names(other: str) -> None:
    assert name(*other.split()) != name("optim.lr=1e-3")


def test_the_name_is_pinned() -> None:
    """Pinned: with another one, the same command would begin a study anew."""
    assert name("optim.lr=1e-3,1e-2", "model.depth=2", "data=pysrc", "optim.clip=null,1") == "adhoc-05d6684e"


VALUES = {
    "optim.lr": ["1e-3", "3e-3", "0.01", "1"],
    "model.depth": ["1", "2", "3"],
    "optim.clip": ["null", "0.5", "1.0"],
    "data": ["pysrc", "synthetic", "c4"],
    "model.init": ["lingua", "scaled"],
}
REQUESTS = st.dictionaries(st.sampled_from(sorted(VALUES)), st.integers(1, 2**4 - 1), min_size=1)


def spelled(request: dict[str, int], backwards: bool) -> list[str]:
    """The request as words, its values chosen by the bits of a number."""
    words = []
    for key, bits in request.items():
        chosen = [v for i, v in enumerate(VALUES[key]) if bits >> i & 1] or VALUES[key][:1]
        words.append(f"{key}={','.join(reversed(chosen) if backwards else chosen)}")
    return words[::-1] if backwards else words


@given(REQUESTS, REQUESTS)
def test_names_are_equal_where_requests_are(one: dict[str, int], other: dict[str, int]) -> None:
    def meaning(request: dict[str, int]) -> set[tuple[str, frozenset[str]]]:
        return {(k, frozenset(v.split(","))) for k, _, v in (w.partition("=") for w in spelled(request, False))}

    assert name(*spelled(one, False)) == name(*spelled(one, True))
    assert (name(*spelled(one, False)) == name(*spelled(other, False))) is (meaning(one) == meaning(other))


def test_plan_and_status_agree_on_it_in_every_process() -> None:
    words = ["optim.lr=3e-3,1e-3", "model=small", "data.path=a b.txt", "data=text"]
    code = "import sys; from stabstudy.planning import overrides; from stabstudy.settings import Issues\n" \
           "print(overrides.read(sys.argv[1:], None, Issues()).study)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    Path("a b.txt").write_text("text\n" * 1000)
    assert planned(*words).study == name(*words) == done.stdout.strip()


# it grows


def test_more_seeds_are_growth() -> None:
    first = planned("optim.lr=1e-3,1e-2", "seeds=1")
    written(first)
    grown = planned("optim.lr=1e-2,1e-3", "seeds=4")
    assert grown.folder == first.folder and grown.warnings == ()
    assert {t.trial_id for t in first.trials} < {t.trial_id for t in grown.trials} and len(grown.trials) == 8


def test_under_a_name_more_values_are_growth() -> None:
    first = planned("optim.lr=1e-3,1e-2", "study=mine")
    written(first)
    grown = planned("optim.lr=1e-3,1e-2,1e-1", "study=mine")
    assert {t.trial_id for t in first.trials} < {t.trial_id for t in grown.trials}
    assert planned("optim.lr=1e-3,1e-2,1e-1").folder != planned("optim.lr=1e-3,1e-2").folder


def test_sweeps_and_questions_of_ones_own_never_mix() -> None:
    written(planned("optim.lr=1e-3", "study=mine"))
    with pytest.raises(ConfigError, match=r"holds another sweep: .* or leave out sweep=, got sweep quickstart, in"):
        planned("sweep=quickstart", "study=mine")
    written(planned("sweep=quickstart", "study=probe"))
    with pytest.raises(ConfigError, match=rf"with study=NAME, or use sweep=quickstart, got sweep {PRIMARY}, in"):
        planned("optim.lr=1e-3", "study=probe")


def test_no_sweep_can_be_called_what_stands_for_none() -> None:
    assert store.check_name(PRIMARY) is not None


def test_status_finds_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["optim.lr=1e-3,1e-2", "model.depth=1"]
    plan = planned(*words)
    written(plan)
    for trial in plan.trials[:2]:
        folder = store.StudyFolder(plan.folder).trial(trial.trial_id)
        folder.path.mkdir(parents=True)
        store.write_json(folder.config_file, {"config": cfg.to_dict(trial.config), "choices": trial.choices})
    assert sweep.main([*words, "seeds=9", "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{plan.study}: 2 trials: 2 pending")
    assert sweep.main(["optim.lr=5e-3", "--status"]) == 2
    assert "adhoc-" in capsys.readouterr().err


def test_status_finds_what_glob_chose(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned("data=glob(synthetic*)", "seeds=1")
    assert len(plan.trials) > 2
    (plan.folder / "trials").mkdir(parents=True)
    assert sweep.main(["data=glob(synthetic*)", "--status"]) == 0
    assert capsys.readouterr().out.startswith(f"{plan.study}: 0 trials")


def test_list_does_not_know_it(capsys: pytest.CaptureFixture[str]) -> None:
    written(planned("optim.lr=1e-3"))
    assert sweep.main(["--list", "optim.lr=1e-3"]) == 0
    assert "adhoc" not in capsys.readouterr().out
