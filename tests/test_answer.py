"""The answer of a study as data, and the command behind "no larger one was tried"."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import tabled
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_recipe import CLIP, DEPTH, LR, ROUGH, UNTRAINED, at, change, rates

from stabstudy.analysis import answer
from stabstudy.analysis import commands as commands_of
from stabstudy.analysis.report import findings
from stabstudy.analysis.report.html import linked_html
from stabstudy.analysis.report.markdown import linked_markdown
from stabstudy.analysis.study import Study
from stabstudy.planning.plan import make_plan
from stabstudy.store import StudyFolder

FLAT = rates((1e-3, 2.6), (1e-2, 2.5), (1e-1, 2.5))
"""Stable up to the largest rate, which is as good as the best."""
SEARCH = "study=depth_lr_frontier 'optim.lr={between:[0.1,1]}'"
COMMAND = "python -m stabstudy.sweep"


def study(rows: list[dict[str, Any]], *typed: str, name: str = "depth_lr") -> Study:
    """These trials as the study of this name, launched with these words."""
    whole = tabled.study(rows)
    whole.folder = StudyFolder(Path(name))
    whole.provenance |= {"argv": list(typed)}
    return whole


def sentences(whole: Study) -> list[str]:
    return [text for finding in findings.findings(whole)[:2] for text in finding.sentences]


def commands(whole: Study) -> list[str]:
    return [text.partition(findings.FINDS)[2] for text in sentences(whole) if findings.FINDS in text]


def two_depths(**at_8: Any) -> list[dict[str, Any]]:
    """Both depths hold up to 0.1 unless depth 8 has other columns there."""
    rows = [row | {DEPTH: depth} for depth in (2, 8) for row in FLAT]
    return change(rows, lambda row: row[DEPTH] == 8 and row[LR] == 0.1, **at_8)


# the command


def test_the_sentence_ends_with_the_command() -> None:
    assert sentences(study(FLAT, "sweep=depth_lr"))[0] == (
        "Every trial is stable up to learning rate 0.1; no larger one was tried. This finds the limit: "
        f"{COMMAND} sweep=depth_lr {SEARCH}"
    )


@pytest.mark.parametrize(
    ("name", "typed", "words"),
    [
        ("quickstart", [], "sweep=quickstart"),
        ("quickstart", ["compute=gpu", "seeds=5"], "sweep=quickstart compute=gpu seeds=5"),
        ("mine", ["study=mine"], "sweep=quickstart"),
        ("depth_lr", ["sweep=depth_lr", "optim.lr=1e-3,0.1", "train.steps=80"], "sweep=depth_lr train.steps=80"),
        ("depth_lr", ["sweep='depth_lr'", "+optim.lr={log:[1e-3,0.1],num:3}"], "'sweep='\"'\"'depth_lr'\"'\"''"),
        ("other", ["sweep=depth_lr", "study=other"], "sweep=depth_lr"),
        ("renamed", ["sweep=depth_lr"], "sweep=depth_lr"),
        ("adhoc-0123abcd", ["optim.lr=1e-3,0.1", "model.depth=2"], "model.depth=2"),
        ("probe", ["optim.lr=1e-3,0.1", "study=probe", "results_dir=a b"], "'results_dir=a b'"),
    ],
)
def test_it_is_the_launch_with_that_axis_searched(name: str, typed: list[str], words: str) -> None:
    assert commands(study(FLAT, *typed, name=name))[0] == f"{COMMAND} {words} {SEARCH.replace('depth_lr', name)}"


def test_what_it_says_can_be_planned_and_is_the_same_question(tmp_path: Path) -> None:
    typed = ["sweep=depth_lr", "optim.lr=1e-3,1e-1", "model.depth=2,4", "train.steps=80", "seeds=1"]
    *words, search = shlex.split(commands(study(FLAT, *typed))[0])[3:]
    first, again = make_plan(typed, tmp_path), make_plan([*words, "optim.lr=0.1"], tmp_path)
    assert {t.trial_id for t in again.trials} == {t.trial_id for t in first.trials if t.config.optim.lr == 0.1}
    assert (again.study, again.folder.parent) == ("depth_lr_frontier", first.folder.parent), "its report stays a grid's"
    (parsed,) = OverridesParser.create().parse_overrides([search])
    assert (parsed.key_or_group, parsed.value()) == ("optim.lr", {"between": [0.1, 1]})


def test_where_the_loss_holds_the_search_is_for_what_works() -> None:
    whole = study(FLAT, "sweep=depth_lr")
    (text,) = [text for text in sentences(whole) if text.startswith("Largest learning rate whose final loss")]
    assert text.endswith(f"the largest tried, (best 0.01). {findings.FINDS}{COMMAND} sweep=depth_lr "
                         "study=depth_lr_frontier 'optim.lr={between:[0.1,1],holds:works}'")  # fmt: skip
    (parsed,) = OverridesParser.create().parse_overrides([shlex.split(text)[-1]])
    assert parsed.value() == {"between": [0.1, 1], "holds": "works"}


def test_levels_whose_limit_is_known_are_left_out() -> None:
    typed = ("sweep=depth_lr", "model.depth=2,8", "seeds=3")
    assert commands(study(two_depths(), *typed))[0] == f"{COMMAND} sweep=depth_lr model.depth=2,8 seeds=3 {SEARCH}"
    one = sentences(study(two_depths(**ROUGH), *typed))
    assert one[0].endswith(f"no larger one was tried. {findings.FINDS}{COMMAND} sweep=depth_lr seeds=3 model.depth=2 "
                           f"{SEARCH}")  # fmt: skip
    assert one[1] == "Depth 8: every trial is stable up to learning rate 0.01; at 0.1, 3 of 3 are not."


def test_a_level_is_written_as_an_override_has_it() -> None:
    rows = [row | {CLIP: clip} for clip in (1.0, None) for row in FLAT]
    rows = change(rows, lambda row: row[CLIP] == 1.0 and row[LR] == 0.1, **ROUGH)
    assert commands(study(rows, "sweep=depth_lr"))[0] == f"{COMMAND} sweep=depth_lr optim.clip=null {SEARCH}"


def test_the_search_ends_where_the_setting_does() -> None:
    rows = rates((0.1, 2.5), (3.0, 2.5))
    assert commands(study(rows, "sweep=depth_lr"))[0].endswith("'optim.lr={between:[3,10]}'")
    assert commands(study(rates((0.1, 2.5), (10.0, 2.5)), "sweep=depth_lr")) == []


def test_a_limit_that_is_known_or_not_above_needs_no_command() -> None:
    for last in (ROUGH, UNTRAINED, {"verdict": None, "verdict_reason": "too_short"}):
        rows = rates((1e-3, 2.6), (1e-2, 2.5), (1e-1, 3.5, last))
        assert commands(study(rows, "sweep=depth_lr")) == []


def test_no_command_where_none_can_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Every trial is stable up to learning rate 0.1; no larger one was tried."
    for words in (["sweep=depth_lr", "data.path=<hidden>"], ["sweep=depth_lr", "data.path=a`b"], ["sweep=a\x1b"]):
        assert sentences(study(FLAT, *words))[0] == text
    assert sentences(tabled.study(FLAT))[0] == text, "a study of before that was recorded"
    several = study([row | {"study": name} for name in "ab" for row in FLAT], "sweep=depth_lr")
    several._axes = {"study": ["a", "b"], LR: [1e-3, 1e-2, 1e-1]}
    assert commands_of.searched(several, 0.1, "stable", {}) is None
    weights = {"objective.init_id": ["0" * 64]}
    assert commands_of.searched(study(FLAT, "sweep=x"), 0.1, "stable", weights) is None, "an identity is no path"
    elsewhere = study(FLAT, "sweep=depth_lr")
    assert commands_of.searched(elsewhere, 0.1, "stable", {}) is not None
    monkeypatch.setattr(elsewhere, "ingested", True)
    assert commands_of.searched(elsewhere, 0.1, "stable", {}) is None


def test_a_recipe_whose_margin_is_open_has_its_own() -> None:
    """Clipping at 1 the largest rate is rough, so the limit over all is known; without clipping it is not."""
    rows = [row | {CLIP: clip, DEPTH: depth} for clip in (1.0, None) for depth in (2, 8) for row in FLAT]
    rows = change(rows, lambda row: row[CLIP] == 1.0 and row[LR] == 0.1, **ROUGH)
    whole = study([row | {"n_evaluable": 388} for row in rows], "sweep=depth_lr")
    use = [text for text in sentences(whole) if text.startswith("For depth 2: use")]
    assert len(use) == 1 and "margin: stable at 10 times this learning rate, the most tried" in use[0]
    assert use[0].endswith(f"{findings.FINDS}{COMMAND} sweep=depth_lr model.depth=2 optim.clip=null {SEARCH}")
    short = study([row | {"n_evaluable": 148} for row in rows], "sweep=depth_lr")
    assert not [t for t in sentences(short) if "use" in t and findings.FINDS in t], "no margin, no limit of it"


def test_one_command_is_not_said_twice() -> None:
    whole = study([row | {"n_evaluable": 388} for row in FLAT], "sweep=depth_lr")
    assert "the most tried" in " ".join(sentences(whole))
    assert len([command for command in commands(whole) if command.endswith(SEARCH)]) == 1


# how it is shown


def test_the_page_and_the_markdown_set_it_apart() -> None:
    text = f"No <b> larger. {findings.FINDS}{COMMAND} sweep=a_b 'optim.lr={{between:[0.1,1]}}'"
    assert linked_html(text, frozenset(), "") == (
        "No &lt;b&gt; larger. This finds the limit: <code>python -m stabstudy.sweep sweep=a_b "
        "&#39;optim.lr={between:[0.1,1]}&#39;</code>"
    )
    assert linked_markdown(text, frozenset()).endswith(
        f"limit: `{COMMAND} sweep=a_b 'optim.lr={{between:[0.1,1]}}'`"
    )  # fmt: skip
    assert linked_markdown(f"x: {COMMAND} `", frozenset()).endswith("\\`"), "what would end the code is escaped"
    assert linked_markdown("a_b: python", frozenset()) == "a\\_b: python"


# as data


def test_the_answer_is_that_of_the_sentences() -> None:
    rows = change(two_depths(**ROUGH), at(1e-3, 0), n_evaluable=150)
    whole = study([row | {"eval_tokens": 16384} for row in rows], "sweep=depth_lr")
    body = answer.answer(whole)
    assert [(row["at"], row["all_stable"], row["first_unstable"]) for row in body["stable_up_to"]] == [
        ({DEPTH: 2}, 0.1, None), ({DEPTH: 8}, 0.01, 0.1),
    ]  # fmt: skip
    open_row, known = body["stable_up_to"]
    assert open_row["next"]["stable"] == commands(whole)[0] and known["next"]["stable"] is None
    assert (known["n_unstable"], known["n_there"], type(known["n_there"])) == (3, 3, int)
    assert [r["given"] for r in body["recipes"]] == [{DEPTH: 2}, {DEPTH: 8}]
    assert all(r["use"].keys() == {LR} and r["final_loss"]["seeds"] == 3 and r["reason"] is None
               for r in body["recipes"])  # fmt: skip


def test_the_answer_without_a_recipe_or_a_rate_says_so() -> None:
    none = answer.answer(study(rates((1e-3, 2.6, ROUGH), (1e-2, 2.5, ROUGH)), "sweep=depth_lr"))
    (row,) = none["recipes"]
    assert row["use"] is None and row["reason"].startswith("no cell is stable") and row["margin"] is None
    assert none["stable_up_to"][0]["all_stable"] is None
    depths = [tabled.trial(depth=depth, seed=seed) for depth in (2, 4) for seed in range(3)]
    assert answer.answer(study(depths, "sweep=depth_lr"))["stable_up_to"] == []
