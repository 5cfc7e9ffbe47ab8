"""Files that were damaged or edited: refused in the package's own words, or read as what they were; never otherwise."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import logs
import pytest

from faults import children, studies
from faults.campaign import Part
from faults.invariants import differences
from faults.killer import Child
from faults.mutations import at_most, edited, little_memory, mutated
from stabstudy import finished, ingest, live, store, trace
from stabstudy.analysis.tables import Tables, read_tables
from stabstudy.trace import DamagedRecord, Rows

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]
Begin = Callable[[str], Part]
ROWS = 300


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trace in its three forms."""
    folder = tmp_path_factory.mktemp("records")
    writer = live.Writer(folder / "trace.live", trace.TRACE, trace.widths(children.DEPTH))
    for first in range(0, ROWS, 60):
        writer.append(children.rows_at(first, 60), urgent=True)
    writer.close()
    rows = live.read(folder / "trace.live", trace.TRACE)
    (folder / "sha").write_text(finished.write(rows, folder / "trace.parquet", {"trial_id": "0123456789"}))
    lines = (_line(rows, i) for i in range(ROWS))
    (folder / "older.jsonl").write_text("".join(lines))
    return folder


def _line(rows: Rows, i: int) -> str:
    values = {n: None if rows.is_null(n)[i] else rows[n][i] for n in rows.schema.names}
    plain = {n: v.tolist() if hasattr(v, "tolist") else v for n, v in values.items()}
    return json.dumps(plain) + "\n"


def first(rows: Rows, n: int) -> Rows:
    return Rows(rows.schema, {k: v[:n] for k, v in rows.columns.items()}, {k: v[:n] for k, v in rows.nulls.items()})


def test_records(part: Begin, records: Path, tmp_path: Path) -> None:
    whole, sha = live.read(records / "trace.live", trace.TRACE), (records / "sha").read_text()
    silent = {"trace.live": 0, "trace.parquet": 0, "older.jsonl": 0}
    with part("records") as running:
        for rng in running.injections():
            name = rng.choice(list(silent))
            data = (records / name).read_bytes()
            label, damaged = mutated(data, rng)
            (file := tmp_path / name).write_bytes(damaged)
            broken = of_reading(file, whole, sha)
            wrong = [line for line in broken if line.startswith("silent")]
            silent[name] += bool(wrong)
            # lines of JSON have no checksum: an edit within a number is a number
            running.add([f"{name}: {label}: {b}" for b in broken if b not in wrong or name != "older.jsonl"])
            file.unlink()
            for left in tmp_path.iterdir():
                left.unlink()
        print(f"read as something else, silently: {silent}")


def of_reading(file: Path, whole: Rows, sha: str) -> list[str]:
    """Foreign exceptions, and values that are not those that were written."""
    readings: list[Callable[[], Rows | None]] = []
    if file.suffix == ".parquet":
        readings = [lambda: finished.read_parquet(file, trace.TRACE, sha)]
        for columns in (None, ["loss"]):  # a reader that does not check may see anything, but must not fall over
            with contextlib.suppress(DamagedRecord):
                finished.read_parquet(file, trace.TRACE, None, columns)
    else:
        path = file.with_suffix(".live")
        readings = [lambda: live.read(path, trace.TRACE), lambda: _cut(path)]
        with contextlib.suppress(DamagedRecord):
            live.last_step(path)
    broken = []
    for reading in readings:
        try:
            with little_memory():
                rows = reading()
        except DamagedRecord:
            continue
        if rows is None or len(rows) > len(whole):
            broken.append(f"silent: {0 if rows is None else len(rows)} rows")
        else:
            broken += [f"silent: {line}" for line in differences(rows, first(whole, len(rows)))]
    return broken


def _cut(path: Path) -> Rows:
    live.cut(path, trace.TRACE, ROWS - 75)
    rows = live.read(path, trace.TRACE)
    assert not rows.note
    return rows


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A study of a few trials: some done, one that diverged, one that was killed."""
    path = tmp_path_factory.mktemp("small") / "study"
    study = studies.write_study(path, [studies.configs()[i] for i in (0, 7, 13, 20)])
    paths = studies.trial_paths(study)
    Child(children.train, paths[:3], 1, cache).end()
    Child(children.train, paths[3:], 1, cache, failpoint="live.written:kill@9").end()
    assert [t.read_state().status for t in study.trials()] == ["done"] * 3 + ["lost"]
    return path


def test_states_and_configs(part: Begin, small: Path, tmp_path: Path) -> None:
    """What a report reads: a trial whose file was changed is left out by name, or is what it was."""
    whole = rows_of(read_tables(store.StudyFolder(small)))
    study = store.StudyFolder(children.copied(small, tmp_path / "study"))
    with part("states and configs") as running:
        for rng in running.injections():
            trial = rng.choice(study.trials())
            name = rng.choice(["state.json", "state.json", "config.json", "config.json", "summary.json"])
            file = trial.path / name
            if not file.exists():
                continue
            data = file.read_bytes()
            label, changed = (edited if rng.random() < 0.7 else mutated)(data, rng)
            file.write_bytes(changed)
            try:
                with at_most(20), little_memory():
                    tables = read_tables(study)
            except Exception as error:
                running.add([f"{name}: {label}: {type(error).__name__}: {error}"])
            else:
                found, damaged = rows_of(tables), {d.trial_id for d in tables.damaged}
                expected = {t: row for t, row in whole.items() if t not in damaged}
                running.check(damaged <= {trial.trial_id}, f"{name}: {label}: {damaged} are damaged")
                running.add([f"{name}: {label}: silent: {line}" for line in different(found, expected)])
            file.write_bytes(data)


def rows_of(tables: Tables) -> dict[str, str]:
    """A trial's row and spikes as text."""
    spikes = {t["trial_id"]: [s for s in tables.spikes if s["trial_id"] == t["trial_id"]] for t in tables.trials}
    return {t["trial_id"]: repr((sorted(t.items()), spikes[t["trial_id"]])) for t in tables.trials}


def different(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    if found.keys() != expected.keys():
        return [f"trials {sorted(found.keys() ^ expected.keys())}"]
    return [f"{t}: {_first_difference(found[t], expected[t])}" for t in found if found[t] != expected[t]]


def _first_difference(a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"...{a[max(0, at - 40) : at + 20]}... was ...{b[max(0, at - 10) : at + 20]}..."


def log_files(folder: Path) -> list[Path]:
    """Logs of some trainers, of 60 rows each."""
    for name in ("hf", "hf-log", "lingua", "plain"):
        (folder / name).mkdir(parents=True)
    history = logs.history(logs.norms(60, {30: 20.0}))
    pairs = zip(logs.losses(60), logs.norms(60), strict=True)
    pairs = zip(logs.losses(60), logs.norms(60), strict=True)
    step = [{"step": i, "loss": loss, "grad_norm": norm} for i, (loss, norm) in enumerate(pairs)]
    table = folder / "table.csv"
    table.write_text("step,loss,grad_norm\n" + "".join(f"{r['step']},{r['loss']},{r['grad_norm']}\n" for r in step))
    made = [logs.trainer_state(folder / "hf", history), logs.trainer_log(folder / "hf-log", history)]
    made += [logs.lingua(folder / "lingua", logs.norms(60)), logs.jsonl(folder / "plain" / "log.jsonl", step), table]
    return [next(p for p in sorted(path.rglob("*")) if p.is_file()) if path.is_dir() else path for path in made]


def test_logs(part: Begin, tmp_path: Path) -> None:
    files = log_files(tmp_path / "logs")
    with part("logs") as running:
        for rng in running.injections():
            file = rng.choice(files)
            data = file.read_bytes()
            label, damaged = mutated(data, rng)
            for _ in range(rng.choice([0, 0, 1, 3])):
                label, damaged = mutated(damaged or b"{", rng)
            file.write_bytes(damaged)
            running.add([f"{file.name}: {label}: {line}" for line in of_ingesting(file, tmp_path / "results", rng)])
            file.write_bytes(data)
            shutil.rmtree(tmp_path / "results", ignore_errors=True)


def of_ingesting(file: Path, results: Path, rng: random.Random) -> list[str]:
    """A foreign exception, a wrong exit code, something written although it was refused."""
    out = io.StringIO()
    path = rng.choice([file, file.parent])
    try:
        with at_most(20), little_memory(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = ingest.main([str(path), "--study", "mutated", "--results-dir", str(results)])
    except BaseException as error:
        return [f"{type(error).__name__}: {error}"]
    broken = [] if code in (0, 2, 3, 4) else [f"exit {code}"]
    broken += ["a traceback"] if "Traceback" in out.getvalue() else []
    return broken + (["refused, and written"] if code == 2 and results.exists() else [])
