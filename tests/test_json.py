"""The objects of `--json`: one on standard output, as docs/json.schema.json and docs/json.md have them."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import planted
import pytest
from conftest import ROOT

from stabstudy import cli, report, store, sweep
from stabstudy.analysis import study as study_module
from stabstudy.analysis.report import publish as publish_module
from stabstudy.analysis.study import Study
from stabstudy.planning import preview
from stabstudy.planning.plan import make_plan
from stabstudy.stability.verdict import VERDICTS
from stabstudy.state import STATUSES
from stabstudy.sweeping import launch as launching
from stabstudy.sweeping import objects, progress

SCHEMA = json.loads((ROOT / "docs" / "json.schema.json").read_text())
PAGE = (ROOT / "docs" / "json.md").read_text()
KINDS = ("plan", "sweeps", "status", "launch", "error")
Out = pytest.CaptureFixture[str]

SMALL = ["optim.lr=1e-3,1e-2", "seeds=2", "study=small", "model.depth=1", "model.dim=16", "data=text"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 600)
    return tmp_path


def check(body: Mapping[str, Any]) -> None:
    """Raises jsonschema.ValidationError for an object that is not as documented."""
    jsonschema.Draft202012Validator(SCHEMA["$defs"][body["kind"]] | {"$defs": SCHEMA["$defs"]}).validate(body)


def strict(text: str) -> Any:
    """The one value of the text. Fails for a bare NaN, and for anything behind it."""

    def refuse(token: str) -> None:
        raise ValueError(token)

    return json.loads(text, parse_constant=refuse)


def answered(capsys: Out, *arguments: str, main: Any = sweep.main, code: int = 0) -> tuple[dict[str, Any], str]:
    """The object that a command writes, which is as documented, and its lines on standard error."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    printed = capsys.readouterr()
    assert printed.out.endswith("\n") and printed.out.count("\n") == 1
    body = strict(printed.out)
    check(body)
    return body, printed.err


# the schema and the page


def paths(node: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The dotted names of all fields of an object of the schema, down to those without any."""
    for name, inner in node["properties"].items():
        if above or name not in ("schema", "kind"):
            yield f"{above}{name}"
            yield from _below(inner, f"{above}{name}")


def _below(node: Mapping[str, Any], name: str) -> Iterator[str]:
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
    node = next((part for part in node.get("anyOf", ()) if part.get("type") != "null"), node)
    if node.get("type") == "array" and "items" in node and node["items"]:
        yield f"{name}[]"
        yield from _below(node["items"], f"{name}[]")
    elif "properties" in node:
        yield from paths(node, f"{name}.")


def section(kind: str) -> str:
    return PAGE.split(f"\n## {kind}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_names_every_field_and_no_other(kind: str) -> None:
    rows = re.findall(r"^\| (`.*?) \|", section(kind), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w.\[\]]+)`", row)]
    leaves = set(paths(SCHEMA["$defs"][kind]))
    inner = {name for name in leaves if any(other.startswith(f"{name}.") for other in leaves)}
    assert len(named) == len(set(named))
    assert set(named) <= leaves | inner
    assert not [n for n in leaves - inner if not {n, f"{n}[]", n.removesuffix("[]")} & set(named)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_example_is_one(kind: str) -> None:
    (text,) = re.findall(r"^```json\n(.*?)^```$", section(kind), re.DOTALL | re.MULTILINE)
    body = strict(text)
    check(body)
    assert body["kind"] == kind and body["schema"] == cli.SCHEMA


def test_the_schema_is_a_schema_and_knows_every_word() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {ref["$ref"].rpartition("/")[2] for ref in SCHEMA["oneOf"]} == set(KINDS)
    assert set(SCHEMA["$defs"]["state"]["enum"]) >= set(STATUSES)
    verdicts = SCHEMA["$defs"]["counts"]["properties"]["verdicts"]["propertyNames"]["enum"]
    assert verdicts == [*VERDICTS, objects.NO_VERDICT]


WRONG: list[tuple[str, Any]] = [
    ("schema", 2), ("kind", "pla"), ("study", None), ("counts", {}), ("counts.done", -1), ("counts.to_do", 1.5),
    ("axes", {"optim.lr": 3}), ("axes", {"optim.lr": [[1]]}), ("trials.0.state", "well"), ("trials.0.id", "xyz"),
    ("trials.0.extra", 1), ("extra", 1), ("cost", 3), ("cost.flops", "nan"), ("cost.measured", "yes"),
    ("seeds", [True]),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_a_wrong_object_is_refused(path: str, value: Any) -> None:
    (text,) = re.findall(r"^```json\n(.*?)^```$", section("plan"), re.DOTALL | re.MULTILINE)
    right = strict(text)
    wrong = copy.deepcopy(right)
    *groups, key = path.split(".")
    target = wrong
    for group in groups:
        target = target[int(group)] if group.isdigit() else target[group]
    target[key] = value
    check(right)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(wrong)


@pytest.mark.parametrize("name", ["folder", "axes", "cost", "obstacles", "kind"])
def test_a_field_that_is_missing_is_missed(name: str) -> None:
    (text,) = re.findall(r"^```json\n(.*?)^```$", section("plan"), re.DOTALL | re.MULTILINE)
    body = strict(text)
    del body[name]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(body)


def test_numbers_that_are_not_finite_are_text(capsys: Out) -> None:
    body = cli.answer("x", {"a": [float("nan"), {"b": (float("inf"), -float("inf"), 1.5, None, True)}], "c": "\udcff"})
    assert cli.reply(lambda: (3, body), "x", ["--json"]) == 3
    assert strict(capsys.readouterr().out) == {
        "schema": 1, "kind": "x", "a": ["NaN", {"b": ["Infinity", "-Infinity", 1.5, None, True]}], "c": "\\udcff",
    }  # fmt: skip


# each of them


def test_the_list(capsys: Out, here: Path) -> None:
    (here / "sweeps").mkdir()
    (here / "sweeps" / "mine.yaml").write_text("# @package _global_\n# Does mine work?\nsweep: {}\n")
    body, err = answered(capsys, "--list")
    rows = {row["name"]: row for row in body["sweeps"]}
    assert rows["mine"] == {"name": "mine", "question": "Does mine work?", "file": str(here / "sweeps" / "mine.yaml")}
    assert {"quickstart", "depth_lr"} <= set(rows) and err == ""


def test_a_plan_is_what_the_text_says(capsys: Out, here: Path) -> None:
    words = [*SMALL, f"data.path={here}/text.txt", "optim.clip=1.0,null"]
    body, err = answered(capsys, *words, "--dry-run")
    assert "warning: " in err and "small starts from conf/trial.yaml alone" in err
    assert sweep.main([*words, "--dry-run"]) == 0
    text = capsys.readouterr()
    plan = make_plan(words, here)
    assert body["axes"] == {"optim.lr": [1e-3, 1e-2], "optim.clip": [1.0, None]} and body["seeds"] == [0, 1]
    assert [t["id"] for t in body["trials"]] == [t.trial_id for t in plan.trials]
    assert [(t["settings"]["optim.lr"], t["settings"]["optim.clip"], t["seed"]) for t in body["trials"]] == [
        (t.config.optim.lr, t.config.optim.clip, t.config.seed) for t in plan.trials
    ]
    assert body["counts"] == {"cells": 4, "trials": 8, "done": 0, "to_do": 8, "damaged": 0}
    assert "8 trials of 4 cells: 0 done, 8 to do in " in text.out and str(here / "results" / "small") == body["folder"]
    assert all(f"{cell['id']}  {cell['settings']['optim.lr']}" in text.out for cell in body["cells"])
    assert all(f"warning: {line}" in text.err for line in body["warnings"]) and body["warnings"]
    assert all(line in text.out for line in body["notes"]) and body["notes"]
    assert body["cost"]["tokens"] == sum(t.config.tokens for t in plan.trials) and not body["cost"]["measured"]
    assert body["starts_from"] == plan.start and list(here.iterdir()) == [here / "text.txt"]


def test_a_plan_knows_what_is_done_damaged_and_in_the_way(capsys: Out, here: Path, monkeypatch: Any) -> None:
    words = [*SMALL, f"data.path={here}/text.txt"]
    plan = make_plan(words, here)
    study = store.StudyFolder(plan.folder)
    for trial, state in zip(plan.trials, ("done", "damaged"), strict=False):
        folder = study.trial(trial.trial_id)
        folder.path.mkdir(parents=True)
        record = {"status": "done", "trial_id": trial.trial_id, "records": {"trace": {"rows": 1, "sha256": "0" * 64}}}
        store.write_sealed(folder.state_file, record) if state == "done" else folder.state_file.write_text("[]")
    study.sweep_file.write_text(plan.sweep_text)
    monkeypatch.setattr(preview, "why_not_here", lambda plan: ["no room"])
    body, _ = answered(capsys, *words, "--dry-run")
    assert [t["state"] for t in body["trials"]] == ["done", "damaged", "pending", "pending"]
    assert body["counts"] == {"cells": 2, "trials": 4, "done": 1, "to_do": 2, "damaged": 1}
    assert body["obstacles"] == ["no room"] and len(body["damaged"]) == 1
    assert [cell["done"] for cell in body["cells"]] == [1, 0]


def test_a_plan_with_nothing_to_do_costs_nothing(here: Path) -> None:
    plan = make_plan([*SMALL, f"data.path={here}/text.txt"], here)
    done = preview.Preview(plan, {t.trial_id: "done" for t in plan.trials}, (), (), (), None, (), ())
    body = objects.plan(done)
    check(json.loads(json.dumps(body)))
    assert body["cost"] is None and body["counts"]["to_do"] == 0


@pytest.mark.parametrize("command", ["sweep", "stabstudy"])
def test_a_status_is_what_the_text_says(command: str, capsys: Out, here: Path) -> None:
    planted.plant_study(here / "results" / "s", depths=(2,), lrs=(1e-3, 0.1), seeds=(0, 1))
    failed = store.StudyFolder(here / "results" / "s").trials()[1]
    state = failed.read_state()
    failed.write_state(type(state)(state.trial_id, "failed", 7, error={"kind": "X", "message": "it broke", "step": 7}))
    how = (sweep.main, ["--status", "study=s"]) if command == "sweep" else (cli.main, ["status", "s"])
    body, err = answered(capsys, *how[1], main=how[0])
    assert err == "" and body["study"] == "s" and not body["launch_running"]
    assert how[0](how[1]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert len(body["trials"]) == 4 == body["counts"]["trials"]
    for trial in body["trials"]:
        line = lines[trial["id"]]
        assert f" {trial['state']} " in line and f" {trial['step']}/{trial['steps']} " in line
        assert (trial["verdict"] or trial["reason"] or "not judged") in line and f"seed={trial['seed']} " in line
    assert body["counts"]["states"]["done"] == 3 and body["counts"]["states"]["failed"] == 1
    assert set(body["counts"]["states"]) == set(STATUSES) and sum(body["counts"]["verdicts"].values()) == 3
    (bad,) = [t for t in body["trials"] if t["state"] == "failed"]
    assert (bad["reason"], bad["verdict"], bad["step"]) == ("it broke", None, 7)


def test_what_cannot_be_read_is_null_or_left_out(here: Path) -> None:
    folder = here / "results" / "s" / "trials" / "0123456789"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    store.write_json(here / "results" / "s" / "provenance.json", {"axes": {"optim.lr": [1e-3], "data": 3}})
    body = objects.status(progress.standing(here / "results" / "s"))
    check(json.loads(json.dumps(body)))
    (trial,) = body["trials"]
    assert body["axes"] == {"optim.lr": [1e-3]}
    assert (trial["settings"], trial["seed"], trial["steps"], trial["cell"]) == ({}, None, None, None)


@pytest.mark.parametrize(
    ("arguments", "code", "errors"),
    [
        (["optim.lrr=1", "optim.lr=nan", "--dry-run"], 2, [("conf", "optim.lrr"), ("conf", "optim.lr")]),
        (["--dryrun"], 2, [("conf", "--dryrun")]),
        (["--status", "study=nothing"], 2, [("study", None)]),
        (["--status", "study=a/b"], 2, [("conf", "study")]),
        (["compute.gpus_per_pack=1", "launcher=local"], 4, [("machine", None)]),
    ],
)
def test_an_error_is_an_object_and_its_lines(
    arguments: list[str], code: int, errors: list[tuple[str, str | None]], capsys: Out, monkeypatch: Any
) -> None:
    def refused(plan: Any) -> list[str]:
        return ["compute.gpus_per_pack=1: this machine has no GPU"]

    monkeypatch.setattr(preview, "why_not_here", refused)
    body, err = answered(capsys, *arguments, code=code)
    assert body["exit_code"] == code and [(e["kind"], e["setting"]) for e in body["error"]] == errors
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert sweep.main(arguments) == code
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")] == lines
    for row, line in zip(body["error"], lines, strict=True):
        assert line == f"error: {row['kind']}: " + ": ".join(filter(None, (row["setting"], row["rule"]))) + (
            f", got {row['got']}" if row["got"] else ""
        )


def test_every_error_is_in_the_object_though_not_in_the_lines(capsys: Out) -> None:
    body, err = answered(capsys, *(f"--x{i}" for i in range(30)), code=2)
    assert len(body["error"]) == 30 and err.splitlines()[-1] == "error: and 10 more"


def test_status_of_two_studies_is_an_error_of_its_own(capsys: Out) -> None:
    body, _ = answered(capsys, "status", "a", "b", main=cli.main, code=2)
    assert body["error"] == [
        {"kind": "status", "setting": "study", "rule": "give one name or folder", "got": "a, b"}
    ]  # fmt: skip


def test_a_bug_and_an_interruption_are_objects_too(capsys: Out, monkeypatch: Any) -> None:
    def raises(error: BaseException) -> Any:
        def broken(*_: object) -> None:
            raise error

        return broken

    for error, code, kind in ((RuntimeError("boom"), 1, "internal"), (KeyboardInterrupt(), 130, "interrupted")):
        monkeypatch.setattr("stabstudy.planning.plan.make_plan", raises(error))
        body, _ = answered(capsys, "--dry-run", code=code)
        assert (body["exit_code"], body["error"][0]["kind"]) == (code, kind)


def test_help_is_for_people(capsys: Out) -> None:
    for arguments in (["--help", "--json"], ["--json", "--version"]):
        assert sweep.main(arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith(("usage: ", "stabstudy ")) and "{" not in out.splitlines()[0]


# a launch


def launched(here: Path, *, code: int = 0, early: bool = False, reason: str | None = None) -> Any:
    """In the place of a launch: it plants a study, prints to standard output in every way, and ends so."""

    def launch(plan: Any, say: Any, console: Any) -> launching.Outcome:
        planted.plant_study(plan.folder, depths=(2,), lrs=(1e-3, 1e-2), seeds=(0, 1))
        print("progress")
        os.write(1, b"from a library\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        return launching.Outcome(code, early, reason)

    return launch


def test_the_end_of_a_launch(capfd: pytest.CaptureFixture[str], here: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(launching, "launch", launched(here))
    monkeypatch.setattr(preview, "why_not_here", lambda plan: [])
    reads: list[Path] = []
    read_tables = study_module.read_tables
    monkeypatch.setattr(study_module, "read_tables", lambda folder: reads.append(folder.path) or read_tables(folder))
    monkeypatch.setattr(publish_module, "publish", lambda study, made, out, progress, mark: out / "index.html")
    assert sweep.main([*SMALL, f"data.path={here}/text.txt", "--json"]) == 0
    printed = capfd.readouterr()
    body = strict(printed.out)
    check(body)
    assert all(line in printed.err for line in ("progress\n", "from a library\n", "from a child\n", "report: "))
    assert reads == [here / "results" / "small"], "the report's making reads the study, and nothing does again"
    assert body["report"] == str(here / "results" / "small" / "report" / "index.html")
    assert body["counts"]["states"]["done"] == 4 and (body["resume"], body["early"]) == (None, False)
    assert body["answer"] == strict(json.dumps(cli._strict(report.answer(Study.load(here / "results" / "small")))))
    (row,) = body["answer"]["stable_up_to"]
    limit = Study.load(here / "results" / "small").largest_stable().iloc[0]
    assert (row["at"], row["trials"], row["all_stable"]) == ({}, 4, limit["all_stable"])
    os.write(1, b"again\n")
    assert capfd.readouterr().out == "again\n", "standard output is given back"


def test_a_launch_that_ends_early_says_how_to_go_on(capsys: Out, here: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(launching, "launch", launched(here, code=4, early=True, reason="Ray is dead"))
    monkeypatch.setattr(preview, "why_not_here", lambda plan: [])
    words = [*SMALL, f"data.path={here}/text.txt"]
    body, lines = answered(capsys, *words, code=4)
    assert "\nsmall: 4 trials: 4 done (" in lines and "stable up to" not in lines, "it counts, and claims nothing"
    assert (body["early"], body["reason"], body["report"], body["answer"]) == (True, "Ray is dead", None, None)
    assert body["resume"].startswith("python -m stabstudy.sweep optim.lr=1e-3,1e-2 seeds=2 study=small")


@pytest.mark.slow
def test_a_real_launch(here: Path) -> None:
    words = [*SMALL, f"data.path={here}/text.txt", "train.steps=12", "train.eval_sequences=8", "optim.warmup_steps=2",
             "launcher=local", f"compute.cache_dir={here}/cache", "--json"]  # fmt: skip
    command = [sys.executable, "-m", "stabstudy.sweep", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    body = strict(done.stdout)
    check(body)
    assert Path(body["report"]).is_file() and body["report"].endswith("/results/small/report/index.html")
    assert done.returncode == body["exit_code"] == 0 and "[4/4]" in done.stderr
    assert body["counts"]["verdicts"] == {"stable": 0, "spiky": 0, "rough": 0, "diverged": 0, "none": 4}
    (none,) = body["answer"]["recipes"]
    assert none["use"] is None and none["reason"]
