"""The judgement that a trial leaves behind: what it is taken over for, and that it is what its files say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import INIT_LOSS, plant_trial, settings
from series import learning, lognormal, trace_rows

from stabstudy import config as cfg
from stabstudy.finished import values_sha256
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.explain import outcome
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import (
    SUMMARY_FORMAT,
    Source,
    Summary,
    judge_trial,
    read_summary,
    source_sha256,
    summarise,
    write_summary,
)
from stabstudy.state import Attempt, State
from stabstudy.store import TrialFolder
from stabstudy.trace import PROBES, TRACE, from_dicts

RULES = Rules()
CONFIG = settings(steps=120)


def same(a: Summary | None, b: Summary) -> bool:
    """Equal, NaN with NaN, the types of the values included."""
    return a is not None and repr((a.columns, a.spikes)) == repr((b.columns, b.spikes))


def judged(folder: TrialFolder, config: cfg.TrialConfig = CONFIG) -> tuple[Summary, Source]:
    source = Source(config, folder.read_state())
    trace = folder.rows(TRACE)
    assert trace is not None
    return judge_trial(trace, folder.rows(PROBES), source, RULES), source


@pytest.fixture
def kept(tmp_path: Path) -> tuple[TrialFolder, Summary, Source]:
    """A planted trial with two spikes, and its judgement on disk."""
    folder = plant_trial(tmp_path, CONFIG, spikes={60: 8.0, 90: 3.5})
    summary, source = judged(folder)
    write_summary(folder, summary, source, RULES)
    return folder, summary, source


Kept = tuple[TrialFolder, Summary, Source]

# --- round trips ---


def test_what_was_kept_is_read(kept: Kept) -> None:
    folder, summary, source = kept
    assert len(summary.spikes) == 2 and summary.columns["verdict"] == "rough"
    assert same(read_summary(folder, source, RULES), summary)


@pytest.mark.parametrize("final", [math.nan, math.inf, -math.inf, 3, None])
def test_numbers_that_are_not_finite_survive(kept: Kept, final: float | None) -> None:
    """In a row, and in a spike whose peak no float holds; the file is strict JSON."""
    folder, _, source = kept
    source = dataclasses.replace(source, state=dataclasses.replace(source.state, final_loss=final, init_loss=final))
    norm = lognormal(0.1, 120, 0)
    norm[50], norm[60:] = 1e-300, norm[60:] * 1e300
    summary = judge_trial(trace_rows(learning(120, 0), norm), None, source, RULES)
    summary.spikes[0]["peak_ratio"] = math.inf if final is None else final
    write_summary(folder, summary, source, RULES)
    json.loads(folder.summary_file.read_text(), parse_constant=lambda word: pytest.fail(f"bare {word}"))
    expected = Summary({**summary.columns}, summary.spikes)
    for name, value in expected.columns.items():
        if COLUMNS[name].kind == "float" and value is not None:
            expected.columns[name] = float(value)  # an integer of the state is a float of the row
    assert same(read_summary(folder, source, RULES), expected)


# --- what is not taken over ---


def test_a_judgement_by_other_rules(kept: Kept) -> None:
    folder, _, source = kept
    assert read_summary(folder, source, Rules(rough_share=0.003)) is None
    assert read_summary(folder, source, Rules(ratio=3)) is not None


OF_STATE: dict[str, Any] = {
    "status": "failed",
    "stop_reason": "log_ended",
    "init_loss": 5.0,
    "final_loss": 3.0,
    "growth_act": 0.1,
    "growth_grad": 0.1,
    "unigram_entropy": 3.0,
    "train_tokens": 9,
    "eval_hash": "0" * 16,
    "records": {},
    "error": {"kind": "OSError"},
}


@pytest.mark.parametrize("name", OF_STATE)
def test_a_judgement_of_another_state(kept: Kept, name: str) -> None:
    folder, _, source = kept
    other = dataclasses.replace(source, state=dataclasses.replace(source.state, **{name: OF_STATE[name]}))
    assert read_summary(folder, other, RULES) is None
    assert other.sha256 != source.sha256


def test_a_judgement_of_other_settings(kept: Kept) -> None:
    folder, _, source = kept
    for group, changes in (("optim", {"warmup_steps": 11}), ("train", {"steps": 121}), ("model", {"depth": 3})):
        other = dataclasses.replace(CONFIG, **{group: dataclasses.replace(getattr(CONFIG, group), **changes)})
        assert read_summary(folder, dataclasses.replace(source, config=other), RULES) is None


def test_who_trained_it_and_when_is_no_part_of_it(kept: Kept) -> None:
    folder, summary, source = kept
    again = Attempt("elsewhere", 7, "2030-01-01T00:00:00+00:00")
    state = dataclasses.replace(
        source.state, attempts=(*source.state.attempts, again), outcome="Stable.", verdict="rough"
    )
    assert same(read_summary(folder, dataclasses.replace(source, state=state), RULES), summary)


def test_the_name_of_a_source_knows_its_log() -> None:
    state, names = State("a"), {}  # type: State, dict[str, str]
    names = {str(log): source_sha256({"seed": 0}, state, log) for log in (None, {"stride": 1}, {"stride": 10})}
    assert len({*names.values(), source_sha256({"seed": 1}, state)}) == 4
    assert all(len(name) == 16 for name in names.values())


def test_the_name_of_a_source_knows_records_by_their_values_where_it_can() -> None:
    def name(**record: object) -> str:
        return source_sha256({"seed": 0}, State("a", records={"trace": {"rows": 3, **record}}))

    assert name(sha256="a" * 64, values_sha256="v" * 64) == name(sha256="b" * 64, values_sha256="v" * 64)
    assert name(sha256="a" * 64, values_sha256="v" * 64) != name(sha256="a" * 64, values_sha256="w" * 64)
    assert name(sha256="a" * 64) != name(sha256="b" * 64), "of an older trial"


def test_the_values_of_a_record_are_named_without_its_clock() -> None:
    rows = {name: [1.0, 2.0, 3.0] for name in TRACE.names} | {"step": [0, 1, 2], "skip": [None, "amp", None]}
    rows |= {"layer_grad_norm": [[1.0, 2.0]] * 3, "tokens": [1, 2, 3]}

    def sha(**changes: list[Any]) -> str:
        table = [dict(zip(rows, values, strict=True)) for values in zip(*(rows | changes).values(), strict=True)]
        return values_sha256(from_dicts(table, TRACE))

    assert sha(seconds=[9.0, 9.0, 9.0]) == sha()
    others = [sha(loss=[1.0, 2.0, 3.5]), sha(loss=[1.0, 2.0, None]), sha(loss=[1.0, 2.0, math.nan])]
    others += [
        sha(skip=[None, None, "amp"]),
        sha(layer_grad_norm=[[1.0, 2.0], [1.0, 2.0], None]),
        sha(tokens=[1, 2, 4]),
    ]
    assert len({sha(), *others}) == 7


def rewritten(folder: TrialFolder, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads(folder.summary_file.read_text())
    change(body)
    folder.summary_file.write_text(json.dumps(body))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(format=SUMMARY_FORMAT + 1),
        lambda body: body.update(format=SUMMARY_FORMAT - 1),
        lambda body: body.pop("columns"),
        lambda body: body.update(columns=None),
        lambda body: body.update(columns=[]),
        lambda body: body.update(spikes=None),
        lambda body: body.update(spikes=[3]),
        lambda body: body["columns"].pop("severity"),
        lambda body: body["columns"].update(more=1),
        lambda body: body["columns"].update(severity="high"),
        lambda body: body["columns"].update(severity=[1]),
        lambda body: body["spikes"][0].pop("level"),
        lambda body: body["spikes"][0].update(more=1),
    ],
)
def test_another_format_and_damaged_contents(kept: Kept, change: Callable[[dict[str, Any]], object]) -> None:
    folder, _, source = kept
    rewritten(folder, lambda body: None)
    assert read_summary(folder, source, RULES) is not None  # rewriting alone changes nothing
    rewritten(folder, change)
    assert read_summary(folder, source, RULES) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00\xff", '{"format": 3}'])
def test_damaged_json(kept: Kept, text: str) -> None:
    folder, _, source = kept
    whole = folder.summary_file.read_bytes()
    folder.summary_file.write_text(text, encoding="latin-1")
    assert read_summary(folder, source, RULES) is None
    for cut in (10, len(whole) // 2, len(whole) - 3):
        folder.summary_file.write_bytes(whole[:cut])
        assert read_summary(folder, source, RULES) is None


def test_no_judgement_at_all(kept: Kept) -> None:
    folder, _, source = kept
    folder.summary_file.unlink()
    assert read_summary(folder, source, RULES) is None


# --- what a judgement is made from ---


def test_the_facts_are_those_of_settings_and_state(kept: Kept) -> None:
    values: Mapping[str, Any] = {
        "optim": {
            "lr": 2e-3,
            "weight_decay": 0.1,
            "decay_mode": "coupled",
            "warmup_steps": 7,
            "clip": 0.5,
            "beta2": 0.99,
        },
        "train": {"steps": 90},
    }
    config = cfg.from_dict({**values, "optim": {**values["optim"], "clip_kind": "adagc"}})
    state = State("a", "done", stop_reason="log_ended", init_loss=5.0, final_loss=2.0, growth_act=0.1, growth_grad=0.2)
    state = dataclasses.replace(state, unigram_entropy=3.0, train_tokens=1000)
    facts = Source(config, state).facts
    assert (facts.steps_planned, facts.warmup_steps, facts.clip, facts.clip_kind, facts.beta2) == (
        90,
        7,
        0.5,
        "adagc",
        0.99,
    )
    assert facts.timescale == pytest.approx(5000)
    assert (facts.status, facts.stop_reason, facts.init_loss, facts.final_loss) == ("done", "log_ended", 5.0, 2.0)
    assert (facts.unigram_entropy, facts.train_tokens, facts.growth_act, facts.growth_grad) == (3.0, 1000, 0.1, 0.2)
    assert (facts.approximate, facts.stride, facts.first_step) == (False, 1, 0)
    independent = cfg.from_dict({"optim": {**values["optim"], "decay_mode": "independent", "weight_decay": 1e-4}})
    assert Source(independent, state).facts.timescale == pytest.approx(10_000)
    without = cfg.from_dict({"optim": {"weight_decay": 0.0}})
    assert Source(without, state).facts.timescale is None


def test_parameters_are_those_of_the_model_without_embeddings() -> None:
    from stabstudy.training import families

    config = settings(depth=3)
    model = families.build(config.model, 300, config.data.seq_len, 0)
    embedding = sum(p.numel() for name, p in model.named_parameters() if 300 in p.shape)
    facts = Source(config, State("a")).facts
    assert facts.parameters == sum(p.numel() for p in model.parameters()) - embedding


# --- a trial of our own ---


def test_a_trial_judges_itself_as_its_files_would(tmp_path: Path) -> None:
    from stabstudy.data import sources
    from stabstudy.store import StudyFolder, write_json
    from stabstudy.training.pack import run_pack
    from stabstudy.training.trial import Engine

    config = cfg.from_dict(
        {
            "model": {"depth": 1, "dim": 16, "n_heads": 2},
            "optim": {"lr": 3e-3, "warmup_steps": 3},
            "data": {"source": "synthetic", "synthetic": {"bytes": 40_000}, "seq_len": 16},
            "train": {"steps": 70, "batch_size": 2, "probe_every": 35, "eval_every": 70, "eval_sequences": 4},
        }
    )
    fingerprint = sources.fingerprint(config.data)
    folder = StudyFolder(tmp_path / "study").trial(cfg.trial_id(config, fingerprint))
    folder.path.mkdir(parents=True)
    body = {"trial_id": folder.trial_id, "config": cfg.to_dict(config), "data_fingerprint": fingerprint}
    write_json(folder.config_file, body)
    (state,) = run_pack([folder], Engine(tmp_path / "cache"), RULES, lambda progress: False)
    assert state.status == "done" and state == folder.read_state()

    trace, source = folder.rows(TRACE), Source(config, state)
    assert trace is not None and len(trace) == 70
    anew = summarise(trace, folder.rows(PROBES), source.facts, RULES)
    own = read_summary(folder, source, RULES)
    assert same(own, anew) and own is not None
    row = own.columns
    assert (state.verdict, state.verdict_code, state.spike_events) == tuple(
        row[name] for name in ("verdict", "verdict_code", "spike_events")
    )
    assert state.verdict_code == "ok" and state.outcome == outcome(row, RULES)
    assert (row["init_loss"], row["final_loss"]) == (state.init_loss, state.final_loss)
    assert row["n_evaluable"] == 70 - 12 and row["tokens_per_parameter"] == 70 * 2 * 16 / config.model.parameters(
        vocab=0
    )
    assert np.isfinite(state.init_loss or math.nan) and state.init_loss != INIT_LOSS
