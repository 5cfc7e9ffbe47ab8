"""A study in a notebook: misspelt names, beginnings of trial ids, what it shows of itself, steps as tables."""

from __future__ import annotations

import html.parser
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pyarrow.parquet as pq
import pytest

from stabstudy import ingest, trace
from stabstudy.analysis import plots
from stabstudy.analysis.lookup import Names
from stabstudy.analysis.report import trial_page
from stabstudy.analysis.study import Study
from stabstudy.trace import TRACE, TRACE_KTO, DamagedRecord, from_dicts


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """2 depths x 3 learning rates, one seed; see `planted.plant_study`."""
    return Study.load(planted.plant_study(tmp_path_factory.mktemp("api") / "planted", seeds=(0,)))


# Misspelt names

HAS = r"of study planted \(it has: model.depth, optim.lr\)"


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (lambda s: s.where({"optim.lrr": 1e-3}), rf"'optim.lrr' is no axis {HAS} and no column of its trials \(did y"),
        (lambda s: s.where({"verdct": "rough"}), r"'verdct' is no axis .* of its trials \(did you mean verdict"),
        (lambda s: s.where({"q": 1}), rf"'q' is no axis {HAS} and no column of its trials.$"),
        (lambda s: s.where({"model.depth": 5}), r"5 is no level of model.depth in study planted \(it has: 2, 6\)"),
        (lambda s: s.where({"model.depth": "2"}), r"'2' is no level of model.depth in study planted \(it has: 2, 6\)"),
        (lambda s: s.where({"optim.lr": None}), r"None is no level of optim.lr .* \(it has: 1e-3, 0.01, 0.1\)"),
        (lambda s: s.where({"optim.clip": 0.5}), r"0.5 is no level of optim.clip in study planted \(it has: 1\)"),
        (lambda s: s.compare("optim.lrr"), rf"'optim.lrr' is no axis {HAS}"),
        (lambda s: s.compare("optim.lr", "final_los"), r"'final_los' is no statistic of study .* mean final_loss"),
        (lambda s: s.compare("optim.lr", by="model.dept"), r"no axis beside the learning rate of study"),
        (lambda s: s.effects(["severty"]), r"'severty' is no statistic of study planted \(did you mean severity"),
        (lambda s: s.claims("severty"), r"'severty' is no statistic of study planted \(did you mean severity"),
        (lambda s: s.largest_stable("optim.lrr"), rf"'optim.lrr' is no axis {HAS}"),
        (lambda s: s.largest_stable(by="model.dept"), r"'model.dept' is no axis beside the learning rate of study"),
        (lambda s: s.sensitivity(by="model.dept"), r"'model.dept' is no axis beside the learning rate of study"),
        (lambda s: s.sensitivity_difference("model.dept"), r"'model.dept' is no axis beside the learning rate"),
        (lambda s: s.time_to_first_spike("model.dept"), rf"'model.dept' is no axis {HAS}"),
        (lambda s: s.steps("los"), r"'los' is no column of a trace of study planted \(it has: tokens, .* loss, grad_"),
        (lambda s: s.steps(["loss", "margin"]), r"'margin' is no column of a trace of study planted"),
        (lambda s: s.row("xyz"), r"no trial xyz in study planted"),
    ],
)  # fmt: skip
def test_a_misspelt_name_is_answered_with_the_nearest(
    study: Study, question: Callable[[Study], object], answer: str
) -> None:
    with pytest.raises(KeyError) as error:
        question(study)
    assert re.search(answer, str(error.value.args[0]) + "." * answer.endswith(".$")) and "\n" not in str(error.value)


def test_what_is_spelt_right_is_taken(study: Study) -> None:
    assert len(study.where({"optim.lr": np.float64(1e-3), "model.depth": np.int64(2)}).trials) == 1
    assert len(study.where({"verdict": "rough", "seed": 0}).trials) == 2
    assert len(study.where({"optim.lr": 1e-3}).where({"optim.lr": 1e-3}).trials) == 2  # an axis no more
    assert set(study.effects("final_loss")["metric"]) == {"final_loss"}


def test_a_study_without_axes_has_none_to_ask_about() -> None:
    with pytest.raises(KeyError, match=r"'optim.lr' is no axis of study s \(it has: none\)"):
        Names("s", {}).axes_beside(None, "optim.lr")


def test_of_many_levels_the_nearest_are_named() -> None:
    levels = [round(0.01 * i, 2) for i in range(1, 31)]
    with pytest.raises(KeyError) as error:
        Names("s", {"optim.lr": levels}).level("optim.lr", 0.155, levels)
    assert re.search(r"\(it has: 0.15, .*, and 27 more\)", str(error.value))


# Beginnings of trial ids


def shortest(study: Study, trial_id: str) -> str:
    return next(trial_id[:n] for n in range(1, 11) if sum(t.startswith(trial_id[:n]) for t in study.trials.index) == 1)


def test_a_beginning_of_an_id_is_enough_everywhere(study: Study) -> None:
    whole = str(study.worst())
    short = shortest(study, whole)
    assert len(short) < 5 and study.trial_id(short) == study.trial_id(whole) == whole
    assert study.row(short) == study.row(whole) and study.describe(short) == study.describe(whole)
    assert study.trace(short)["grad_norm"].tolist() == study.trace(whole)["grad_norm"].tolist()
    probes = [study.probes(t) for t in (short, whole)]
    assert all(p is not None and len(p) == len(probes[0] or ()) > 0 for p in probes)
    assert study.log(short) is None
    with pytest.raises(ValueError, match="got 999"):
        study.batch(short, 999)
    assert trial_page.explanation(study, short) == trial_page.explanation(study, whole)
    drawn = [[len(ax.get_children()) for ax in plots.trial(study, t).axes] for t in (short, whole)]
    assert drawn[0] == drawn[1]


def test_an_ambiguous_beginning_is_refused_with_the_trials(study: Study) -> None:
    names = Names("s", {})
    with pytest.raises(KeyError, match="'ab' begins 2 trials of study s: ab1, ab2"):
        names.trial("ab", ["ab1", "ab2", "b"])
    with pytest.raises(KeyError, match=r"'a' begins 9 trials of study s: a0, a1, a2, a3, a4, a5, \.\.\."):
        names.trial("a", [f"a{i}" for i in range(9)])
    assert names.trial("ab", ["ab", "abc"]) == "ab"  # the whole id of one
    with pytest.raises(KeyError, match="no trial  in"):
        names.trial("", ["only"])  # an empty text is forgotten, and no beginning
    with pytest.raises(KeyError, match=r"no trial 42b0 in study s \(did you mean 42b1\?\)"):
        names.trial("42b0", ["42b1", "9999"])


def test_trials_of_several_studies_are_known_by_either_id(study: Study) -> None:
    whole = Study.concat([study, study], names=["a", "b"])
    short = shortest(study, str(study.worst()))
    assert whole.trial_id(f"b/{short}") == f"b/{study.worst()}"
    assert whole.trace(f"b/{short}")["loss"].tolist() == study.trace(short)["loss"].tolist()
    with pytest.raises(KeyError, match=f"begins 2 trials of study planted: a/{study.worst()}, b/"):
        whole.row(short)


# What it shows of itself


class Text(html.parser.HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_study_shows_question_counts_axes_and_folder(study: Study) -> None:
    lines = repr(study).splitlines()
    assert lines == [
        f"Study planted: {planted.QUESTION}",
        "  6 trials: 4 stable, 2 rough",
        "  model.depth: 2, 6",
        "  optim.lr: 1e-3, 0.01, 0.1",
        f"  folder: {study.folder.path}",
    ]
    text = Text(study._repr_html_()).text
    assert all(part in text for line in lines for part in line.strip().split(": ", 1)[1:])


def test_states_and_damage_are_counted(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(), status="failed", steps_done=3)
    bad = planted.plant_trial(tmp_path / "s", planted.settings(seed=1))
    bad.finished(TRACE).unlink()
    assert "\n  2 trials: 1 failed, 1 damaged\n" in repr(Study.load(tmp_path / "s"))
    planted.plant_frame(tmp_path / "empty")
    assert "\n  0 trials: –\n" in repr(Study.load(tmp_path / "empty"))


def test_whatever_a_file_says_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>&<img src=x onerror=y>"
    path = tmp_path / "<b>s&t"
    planted.plant_frame(path, question=evil)
    for data, source in (("<i>one", "pysrc"), ("two", "synthetic")):
        planted.plant_trial(path, planted.settings(data={"source": source}), choices={"data": data})
    page = Text(Study.load(path)._repr_html_())
    assert set(page.tags) == {"p", "b", "table", "tbody", "tr", "th", "td"} and page.tags.count("b") == 1
    assert evil in page.text and "<i>one" in page.text and "<b>s&t" in page.text
    rows = trace.Rows(TRACE, {n: np.empty(0) for n in TRACE.names}, {n: np.empty(0, bool) for n in TRACE.names}, evil)
    page = Text(rows._repr_html_())
    assert set(page.tags) == {"p", "table", "tbody", "tr", "td"} and evil in page.text


def test_a_trace_shows_its_columns(study: Study) -> None:
    rows = study.trace(str(study.worst()))
    assert repr(rows) == (
        "trace of 120 rows, step 0 to 119: step, tokens, seconds, lr, loss, grad_norm, clip_scale, layer_grad_norm, "
        "logit_absmax, logz_mean; all null: loss_scale, skip"
    )
    cells = re.findall(r"<td>([^<]*)</td>", rows._repr_html_())
    table = [cells[i : i + 6] for i in range(0, len(cells), 6)]
    (loss,) = [row for row in table if row[0] == "loss"]
    assert loss[1] == "nat/token" and loss[3:] == ["0", f"{planted.loss_at(119):.6g}", f"{planted.loss_at(0):.6g}"]
    assert [row[3:] for row in table if row[0] in ("loss_scale", "skip")] == [["120", "", ""]] * 2
    assert repr(from_dicts([], TRACE)).startswith("trace of 0 rows: ; all null: step, ")


# Steps as tables


def as_rows(records: list[dict[str, Any]], kto: bool = False) -> trace.Rows:
    plain = {"tokens": 8, "seconds": 0.1, "lr": 1e-3, "loss": 2.0, "sequences_chosen": 1, "sequences_rejected": 1}
    plain |= {"targets_chosen": 3, "targets_rejected": 3}
    given = [plain | {"step": i} | record for i, record in enumerate(records)]
    return from_dicts(given, TRACE_KTO if kto else TRACE)


def test_null_nan_and_infinity_stay_apart_in_a_frame() -> None:
    values = [1.5, math.nan, None, math.inf, -math.inf]
    frame = as_rows([{"clip_scale": v, "skip": "amp" if v is None else None} for v in values]).frame()
    column = frame["clip_scale"]
    assert [None if v is pd.NA else str(v) for v in column] == ["1.5", "nan", None, "inf", "-inf"]
    assert column.isna().tolist() == [False, False, True, False, False] and str(column.dtype) == "Float64"
    assert frame["skip"].tolist() == [None, None, "amp", None, None]
    assert str(frame["lr"].dtype) == "float64" and str(frame["step"].dtype) == "int64"
    assert np.asarray(frame["loss"]).dtype == np.float64  # what a plot takes, where no value is null


def test_a_frame_has_a_column_for_each_layer() -> None:
    rows = as_rows([{"layer_grad_norm": [1.0, 2.0, 3.0, 4.0]}, {"layer_grad_norm": None}])
    frame = rows.frame()
    named = {n: frame[n].tolist() for n in map(str, frame) if n.startswith("layer_grad_norm")}
    assert named == {
        "layer_grad_norm_embed": [1.0, pd.NA],
        "layer_grad_norm_0": [2.0, pd.NA],
        "layer_grad_norm_1": [3.0, pd.NA],
        "layer_grad_norm_head": [4.0, pd.NA],
    }
    assert [n for n in frame if n not in named] == [n for n in TRACE.names if n != "layer_grad_norm"]
    none = as_rows([{"layer_grad_norm": None}]).frame()
    assert not [n for n in map(str, none) if n.startswith("layer_grad_norm")]


def test_probes_are_a_frame_too(study: Study) -> None:
    probes = study.probes(study.where({"model.depth": 2, "optim.lr": 1e-3}).trials.index[0])
    assert probes is not None
    frame = probes.frame()
    assert [n for n in map(str, frame) if n.startswith("attn_entropy")] == ["attn_entropy_0", "attn_entropy_1"]
    assert frame["attn_logit_max_1"].tolist() == probes["attn_logit_max"][:, 1].tolist()


def test_a_frame_is_a_copy() -> None:
    rows = as_rows([{"layer_grad_norm": [1.0, 2.0, 3.0]}, {"layer_grad_norm": [1.0, 2.0, 3.0]}])
    frame = rows.frame()
    for name in ("loss", "lr", "layer_grad_norm_embed"):
        frame.loc[0, name] = 9.0
        frame.loc[1, name] = pd.NA if name != "lr" else math.nan
    assert rows["loss"].tolist() == [2.0, 2.0] and rows["lr"].tolist() == [1e-3, 1e-3]
    assert rows["layer_grad_norm"][:, 0].tolist() == [1.0, 1.0] and not rows.nulls["layer_grad_norm"].any()
    assert frame["layer_grad_norm_0"].tolist() == [2.0, 2.0]


def test_steps_are_those_of_the_files(study: Study) -> None:
    table = study.steps(["loss", "grad_norm"])
    assert list(table) == ["trial_id", "model.depth", "optim.lr", "seed", "step", "loss", "grad_norm"]
    assert list(dict.fromkeys(table["trial_id"])) == list(study.trials.index) and len(table) == 6 * 120
    for trial_id, own in table.groupby("trial_id"):
        file = pq.read_table(study.folder.path / "trials" / str(trial_id) / "trace.parquet")
        for name in ("step", "loss", "grad_norm"):
            assert own[name].tolist() == file[name].to_pylist()
        row = study.row(str(trial_id))
        assert all(set(own[name]) == {row[name]} for name in ("model.depth", "optim.lr", "seed"))
    assert table["grad_norm"].sum() == pytest.approx(sum(study.trace(t)["grad_norm"].sum() for t in study.trials.index))
    assert study.steps("loss").equals(table.drop(columns="grad_norm"))


def test_only_the_columns_asked_for_are_read(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    whole, reader = pq.ParquetFile.read, Path.read_bytes

    def spied(self: Any, columns: list[str], **how: Any) -> Any:
        read.append(columns)
        return whole(self, columns=columns, **how)

    def refused(self: Path) -> bytes:
        assert self.name != "trace.parquet", "the whole file was read"
        return reader(self)

    study.trials  # noqa: B018  (what the table needs is read before)
    monkeypatch.setattr(pq.ParquetFile, "read", spied)
    monkeypatch.setattr(Path, "read_bytes", refused)
    study.steps("grad_norm")
    assert read == [["step", "grad_norm"]] * 6
    with pytest.raises(AssertionError, match="the whole file"):  # as it is for a trace
        study.trace(str(study.worst()))


def test_models_of_different_depth_have_their_layers_in_common_columns(study: Study) -> None:
    table = study.steps(["layer_grad_norm", "loss", "layer_grad_norm"])
    names = [n for n in map(str, table) if n.startswith("layer_grad_norm")]
    assert names == [f"layer_grad_norm_{n}" for n in ("embed", *range(6), "head")] and list(table)[-1] == "loss"
    shallow = table["model.depth"] == 2
    assert table.loc[shallow, "layer_grad_norm_1"].notna().all() and table.loc[~shallow, names].notna().all().all()
    assert table.loc[shallow, [f"layer_grad_norm_{n}" for n in range(2, 6)]].isna().all().all()


def test_steps_of_a_running_study_and_of_trials_that_never_began(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    live = planted.plant_trial(tmp_path / "s", planted.settings(clip=None), status="running", steps_done=30)
    done = planted.plant_trial(tmp_path / "s", planted.settings())
    pending = planted.plant_trial(tmp_path / "s", planted.settings(seed=1), status="failed", steps_done=0)
    pending.live(TRACE).unlink()
    table = Study.load(tmp_path / "s").steps("clip_scale")
    assert table["trial_id"].value_counts().to_dict() == {live.trial_id: 30, done.trial_id: 120}
    clipped = table["trial_id"] == done.trial_id
    assert table.loc[clipped, "clip_scale"].notna().all() and table.loc[~clipped, "clip_scale"].isna().all()
    assert table.loc[~clipped, "optim.clip"].isna().all()
    planted.plant_frame(tmp_path / "none")
    empty = Study.load(tmp_path / "none").steps(["loss", "grad_norm"])
    assert list(empty) == ["trial_id", "seed", "step"] and len(empty) == 0


def test_names_that_begin_alike_are_each_their_own() -> None:
    from stabstudy.analysis import step_table

    trials = pd.DataFrame({"seed": [0, 1]}, index=pd.Index(["a", "b"], name="trial_id"))
    lm, kto = as_rows([{"logz_mean": 5.0}]), as_rows([{"logz_mean": 1.0, "logz_mean_chosen": 2.0}], kto=True)
    wanted = ["logz_mean", "logz_mean_chosen", "sequences_chosen"]
    table = step_table.table(trials, [("a", lm.only(wanted)), ("b", kto.only(wanted))], wanted)
    assert list(table) == ["trial_id", "seed", "step", *wanted]
    assert table["logz_mean"].tolist() == [5.0, 1.0] and table["logz_mean_chosen"].tolist() == [pd.NA, 2.0]
    assert table["sequences_chosen"].tolist() == [pd.NA, 1] and str(table["sequences_chosen"].dtype) == "Int64"


def test_steps_of_several_studies(study: Study) -> None:
    whole = Study.concat([study, study], names=["a", "b"])
    table = whole.steps("loss")
    assert list(table)[:2] == ["trial_id", "study"] and table["study"].value_counts().to_dict() == {"a": 720, "b": 720}
    assert table.loc[table["study"] == "b", "loss"].tolist() == study.steps("loss")["loss"].tolist()


def test_steps_of_logs_are_those_of_their_source(tmp_path: Path) -> None:
    for run, top in (("one", 3), ("two", 4)):
        (tmp_path / run).mkdir()
        lines = [f"{step},{top - step / 1000},{1 + step / 500}" for step in range(10, 610, 10)]
        (tmp_path / run / "log.csv").write_text("\n".join(["step,loss,grad_norm", *lines]))
    runs = [str(tmp_path / run) for run in ("one", "two")]
    assert ingest.main([*runs, "--study", "s", "--results-dir", str(tmp_path)]) == 0
    study = Study.load(tmp_path / "s")
    table = study.steps(["loss", "grad_norm"])
    assert table["step"].tolist() == [*range(10, 610, 10)] * 2
    assert sorted(table["loss"]) == sorted(top - step / 1000 for top in (3, 4) for step in range(10, 610, 10))
    whole = Study.concat([study, study], names=["a", "b"])  # whose logs lie in their own folders
    assert whole.steps("loss")["step"].tolist() == table["step"].tolist() * 2
    assert whole.trace(whole.trials.index[0])["step"][0] == 10


def test_a_record_that_rots_while_the_study_is_open_is_seen(tmp_path: Path) -> None:
    study = Study.load(planted.plant_study(tmp_path / "s", depths=(2,), lrs=(1e-3,), seeds=(0,)))
    (trial_id,) = study.trials.index
    file = study.folder.trial(trial_id).finished(TRACE)
    whole = bytearray(file.read_bytes())
    sound = study.steps("grad_norm")["grad_norm"].tolist()
    seen = 0
    for place in range(4, len(whole) - 4, 97):
        whole[place] ^= 8
        file.write_bytes(whole)
        try:
            assert study.steps("grad_norm")["grad_norm"].tolist() == sound  # another column's page
        except DamagedRecord:
            seen += 1
        whole[place] ^= 8
    assert seen > 10


def test_the_readme_shows_the_short_ways() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert 'study.steps(["loss", "grad_norm"])' in text and ".frame()" in text
