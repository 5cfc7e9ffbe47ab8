"""Bad input of the kinds that a fuzzer found: numbers, paths and texts too large, and devices where files should be."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import planted
import pytest
from test_bad_inputs import ONE, compose_once, empty_folder, refused, sweep_file  # noqa: F401  # two are fixtures

from stabstudy import ingest, report, settings, sweep
from stabstudy.planning.overrides import LONGEST_PATH

Capture = pytest.CaptureFixture[str]
LONGEST_LINE = 2100
LIMIT = 60  # seconds, on a loaded machine


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A test that waits for a pipe fails after a minute."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError("waits")  # and not TimeoutError, which is an OSError

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    "seeds", ["seeds=[99999999999999999999]", "seeds=[0,9223372036854775808]", "seed=10" + "0" * 20]
)
def test_a_seed_that_is_too_large(capsys: Capture, seeds: str) -> None:
    (line,) = refused(capsys, "sweep=quickstart", seeds)
    assert line.startswith("error: conf: seeds: each must be a whole number in [0, 9,223,372,036,854,775,807], got ")


def test_a_seed_that_is_too_large_in_a_file(capsys: Capture) -> None:
    sweep_file("sweep:\n  seeds: [1, 9223372036854775808]")
    assert "(sweeps/own.yaml:2)" in refused(capsys, "sweep=own")[0]
    sweep_file("sweep:\n  seeds: [9223372036854775807]")
    assert sweep.main(["sweep=own", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("folder", "rule"),
    [
        ("a" * 256, "each folder's name must have at most 255 bytes"),
        ("'b/" + "\N{GREEK SMALL LETTER ALPHA}" * 128 + "'", "each folder's name must have at most 255 bytes"),
        ("/".join(["a" * 200] * 25), "the whole path must have at most"),
        ("'a\0b'", "must not contain a NUL"),
        ("'a\udc80\ud800b'", "must be a path that this system can encode"),
    ],
)
@pytest.mark.parametrize("flag", ["--dry-run", "--status"])
def test_a_results_folder_that_cannot_be_one(capsys: Capture, folder: str, rule: str, flag: str) -> None:
    assert sweep.main([*ONE, f"results_dir={folder}", flag]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "results_dir" in line and rule in line]
    assert len(line) < LONGEST_LINE and not list(Path.cwd().iterdir())


def test_the_longest_results_folder_holds_a_whole_study(capsys: Capture) -> None:
    part = LONGEST_PATH - len(os.fsencode(Path.cwd())) - 1
    deep = "/".join("a" * 200 for _ in range(part // 201))
    assert sweep.main([*ONE, f"results_dir={deep}", "--dry-run"]) == 0
    checkpoint = f"quickstart{'x' * 54}/trials/0123456789/checkpoint/step-00000000.tmp/tensors.safetensors"
    assert len(checkpoint) + 2 * len("/.1234567.tmp") < 4095 - LONGEST_PATH


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_a_sweep_file_that_is_no_file(capsys: Capture, kind: str) -> None:
    path = Path("sweeps", "own.yaml")
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    assert sweep.main(["sweep=own", "--dry-run"]) == 2
    assert capsys.readouterr().err == f"error: conf: sweeps/own.yaml: is a {kind}, not a file\n"
    assert sweep.main(["--list"]) == 0


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "lingua"])
@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_data_that_are_no_file(capsys: Capture, source: str, path: str) -> None:
    os.mkfifo("pipe")
    assert sweep.main([*ONE, "optim.lr=1e-3", f"data.source={source}", f"data.path={path}", "--dry-run"]) == 2
    assert "error: conf: data.path: " in capsys.readouterr().err


KEYS = ["true: 1", "1: 2", "null: 2", "1.5: 2", "2001-01-01: 2", "optim: {1: 2}", "sweep: {grid: {true: [1]}}"]
KEYS += ["sweep: {cases: {52: {optim.lr: 1}}}", "sweep: {zip: [{1: [1]}]}", "defaults: [{true: 1}]"]


@pytest.mark.parametrize("text", KEYS)
def test_a_key_that_is_no_text_has_its_line(capsys: Capture, text: str) -> None:
    sweep_file(f"\n{text}")
    (line,) = refused(capsys, "sweep=own")
    assert line.startswith("error: conf: sweeps/own.yaml:2: a key must be text: ") and line.endswith("; quote it")


TAGS = ["!!bool x", "!!timestamp x", "!!int x", "!!float x", "!!binary '#'", "!!set [a]", "!!omap {a: 1}", "!!pairs 3"]
TAGS += ["2001-99-99", "!!null x", "!!merge x", "!!x y", "!y z", "0b2"]


@pytest.mark.parametrize("value", TAGS)
def test_a_tag_that_its_value_does_not_fit(capsys: Capture, value: str) -> None:
    """In a sweep file, and in the sweep.yaml of a study: the readers of YAML raise errors of every kind."""
    sweep_file(f"optim: {{lr: {value}}}")
    assert refused(capsys, "sweep=own")[0].startswith("error: conf: ")
    Path("results", "quickstart").mkdir(parents=True)
    Path("results", "quickstart", "sweep.yaml").write_text(f"format: 1\nsweep: quickstart\nsettings: {{a: {value}}}\n")
    assert sweep.main([*ONE, "--dry-run"]) in (0, 2)
    assert "internal" not in capsys.readouterr().err


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "argument",
    [f"optim.lr={LONG}", f"data.path={LONG}", f"{LONG}=1", f"study={LONG}", LONG, f"-{LONG}", f"sweep={LONG}",
     f"data={LONG}", f"optim.lr=[{'1,' * 50_000}]", f"results_dir={LONG}", f"optim.lr={{log:{LONG}}}",
     f"seeds={LONG}", f"launcher={LONG}", f"compute.address={LONG}", f"optim.lr=${{oc.env:{LONG}}}",
     f"compute.{LONG}=1", f"optim.lr=choice({LONG},2)", f"+_target_={LONG}"],
    ids=lambda a: a[:20],
)  # fmt: skip
def test_a_message_about_something_long_is_short(capsys: Capture, argument: str) -> None:
    assert sweep.main([*ONE, argument, "--dry-run"]) in (0, 2)
    lines = capsys.readouterr().err.splitlines()
    assert all(len(line) < LONGEST_LINE for line in lines), max(map(len, lines))
    assert len({line[:100] for line in lines}) == len(lines), "each once"


@pytest.mark.parametrize("text", [f"optim: {{{LONG}: 1}}", f"{LONG}: 1", f"optim: {{lr: {LONG}}}", f"a: [{LONG}"])
def test_a_message_about_a_long_file_is_short(capsys: Capture, text: str) -> None:
    sweep_file(text)
    assert all(len(line) < LONGEST_LINE for line in refused(capsys, "sweep=own"))


def test_a_long_line_keeps_its_ends() -> None:
    line = settings.line("begin" + "x" * 5000 + "\nend")
    assert line.startswith("begin") and line.endswith("\\nend") and len(line) < LONGEST_LINE
    assert settings.line("short") == "short"


# the other commands


@pytest.mark.parametrize(
    "path", ["pipe", "a\0b", "x" * 300, "x" * 5000, "/dev/zero", "", "loop", "\udcff", "a\x1b[31m"]
)
def test_a_study_to_report_that_is_none(capsys: Capture, path: str) -> None:
    os.mkfifo("pipe"), Path("loop").symlink_to("loop")
    assert report.main([path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: report: ") and line.isprintable() and len(line) < LONGEST_LINE


@pytest.mark.parametrize(("out", "code"), [("pipe", 4), ("a\0b", 2), ("x" * 300, 4), ("x" * 5000, 4), ("/dev/null", 4)])
def test_a_folder_for_a_report_that_cannot_be_one(capsys: Capture, out: str, code: int) -> None:
    os.mkfifo("pipe")
    study = planted.plant_study(Path("s"), depths=(2,), lrs=(1e-3,), seeds=(0,))
    assert report.main([str(study), "--out", out]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: report: ") and len(line) < LONGEST_LINE


def test_what_a_damaged_file_says_does_not_steer_a_terminal(capsys: Capture) -> None:
    study = planted.plant_study(Path("s"), depths=(2,), lrs=(1e-3,), seeds=(0,))
    (config,) = study.glob("trials/*/config.json")
    config.write_text('{"format": 1, "trial_id": "\\u001b[31mred\\u0007"}')
    assert report.main([str(study)]) == 3
    out = capsys.readouterr().out
    assert "belongs to trial \\x1b[31mred\\x07" in out and "\x1b" not in out


def test_a_folder_of_logs_with_a_pipe_in_it_is_not_waited_for(capsys: Capture) -> None:
    Path("logs").mkdir()
    os.mkfifo("logs/log.jsonl")
    assert ingest.main(["logs", "--study", "i"]) == 2
    assert ingest.main(["x" * 5000, "--study", "i"]) == 2
    assert all(len(line) < LONGEST_LINE for line in capsys.readouterr().err.splitlines())


# whatever is typed


ODD = [
    "", "0", "-1", "1e400", "nan", "null", "true", "[]", "{}", "[[1]]", "{a:1}", "'", '"', "\\", "$", "${", "${x}",
    "???", "\N{ROCKET}", "\x00", "\x1b[31m", "a\nb", "../..", "/", "~", "~x", "~/x", "-", "--", "=", "==", ",", ",,",
    "a,", "*", "1,2", "range(1,3)", "range(3)", "glob(*)", "choice(1,2)", "interval(0,1)", "sort(2,1)", "shuffle(1,2)",
    "tag(a,1)", "extend_list(1)", "9" * 30, "-" + "9" * 30, "1_000", "0x10", "1e-400", "a" * 300, "\udcff", "/dev/null",
    "/dev/zero", "/proc/self/mem", "con", "a b", " a", "a ", "cast(1)", "str(1)", "int(a)", "float(1)", "bool(2)",
    "json_str({})",
]  # fmt: skip
"""Values that some reader stumbles over."""

NAMES = [
    "sweep", "study", "results_dir", "seeds", "seed", "launcher", "max_trials", "force", "compute", "compute.address",
    "compute.pack", "compute.retries", "compute.threads", "compute.gpus_per_pack", "compute.hang_timeout", "model",
    "model.depth", "model.dim", "model.family", "model.qk_norm", "optim", "optim.lr", "optim.clip", "optim.kind",
    "optim.warmup_share", "data", "data.path", "data.source", "data.text_column", "data.seq_len", "data.max_bytes",
    "data.hub_revision", "train", "train.steps", "train.compile", "train.precision", "hydra.run.dir", "x", "", "a.b.c",
]  # fmt: skip


def launches(rng: random.Random, number: int) -> Iterator[list[str]]:
    for _ in range(number):
        words = [f"{rng.choice(['', '', '', '+', '++', '~'])}{rng.choice(NAMES)}={rng.choice(ODD)}" for _ in range(2)]
        yield words[: rng.choice([1, 1, 2])] + rng.choice([[], [], ["seeds=1"], [rng.choice(ODD)]])


@pytest.mark.parametrize("part", range(4))
def test_no_command_is_our_bug(capsys: Capture, part: int) -> None:
    """Names and values of every kind against each other: an answer or one line for each problem, never a traceback."""
    before = sorted(Path.cwd().rglob("*"))
    for words_ in launches(random.Random(part), 40):
        signal.alarm(LIMIT)
        code = sweep.main([*words_, "--dry-run"])
        err = capsys.readouterr().err
        assert code in (0, 2) and "internal" not in err and "Traceback" not in err, (words_, err)
        assert all(line.startswith(("error: ", "warning: ")) and len(line) < LONGEST_LINE for line in err.splitlines())
        assert sorted(Path.cwd().rglob("*")) == before, words_
