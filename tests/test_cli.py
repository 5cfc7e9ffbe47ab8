"""The console script and what its commands share: exit codes, arguments, the version."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import planted
import pytest

import stabstudy
from stabstudy import cli, export, ingest, report, sweep
from stabstudy.settings import ConfigError

ROOT = Path(__file__).resolve().parent.parent
Main = Callable[[list[str]], int]
MAINS: dict[str, Main] = {
    "sweep": sweep.main,
    "report": report.main,
    "ingest": ingest.main,
    "export": export.main,
    "stabstudy": cli.main,
}
Out = pytest.CaptureFixture[str]


def script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stabstudy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


def test_the_console_script_is_this_function() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"stabstudy": "stabstudy.cli:main"}


# exit codes


@pytest.mark.parametrize("name", MAINS)
def test_every_help_ends_with_the_table_of_exit_codes(name: str, capsys: Out) -> None:
    assert MAINS[name](["--help"]) == 0
    table = capsys.readouterr().out.split("exit codes:\n")[1]
    rows = {int(code): meaning for code, meaning in re.findall(r"^  (\d+) +(\S.*)$", table, re.MULTILINE)}
    assert rows == cli.EXIT_CODES


def test_the_table_has_the_codes_that_shells_see() -> None:
    assert set(cli.EXIT_CODES) == {0, 1, 2, 3, 4, 5, 129, 130, 138, 143}
    assert (cli.OK, cli.BAD_INPUT, cli.PARTIAL, cli.ENVIRONMENT, cli.GATE_FAILED) == (0, 2, 3, 4, 5)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        assert "the same command resumes" in cli.EXIT_CODES[128 + number]


@pytest.mark.parametrize(
    ("ending", "code"),
    [(lambda: 3, 3), (lambda: sys.exit(0), 0), (lambda: sys.exit(), 0), (lambda: sys.exit(2), 2)],
)
def test_the_code_is_that_of_the_command(ending: Callable[[], int], code: int) -> None:
    assert cli.run(ending, "x") == code


def test_ctrl_c_is_130_and_no_traceback(capsys: Out) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert cli.run(interrupted, "x") == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_ctrl_c_while_a_command_is_imported(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stabstudy.cli.importlib.import_module", interrupted)
    assert cli.main([command]) == 130


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0, "x")


# arguments


@pytest.mark.parametrize(
    ("name", "arguments", "lines"),
    [
        ("sweep", ["--dryrun"], ["conf: --dryrun: is not a flag (did you mean --dry-run?)"]),
        ("sweep", ["--dry"], ["conf: --dry: is not a flag (did you mean "]),
        ("sweep", ["--list=x"], ["conf: --list: ignored explicit argument 'x'"]),
        ("report", ["s", "--oot", "d"], ["report: --oot: is not a flag (did you mean --out?)"]),
        ("report", ["s", "--ou", "d"], ["report: --ou: is not a flag (did you mean --out?)"]),
        ("report", ["s", "--out"], ["report: --out: expected one argument"]),
        ("report", [], ["report: the following arguments are required: study"]),
        ("ingest", ["x"], ["ingest: the following arguments are required: --study"]),
        ("ingest", ["x", "--study", "s", "--colums", "a=b"], ["ingest: --colums: is not a flag (did you mean --co"]),
        ("stabstudy", ["--versoin"], ["stabstudy: --versoin: is not a flag (did you mean --version?)"]),
        ("stabstudy", ["reprot", "x"], ["stabstudy: command: must be one of sweep, report, ingest, export, status ("]),
        ("stabstudy", ["hlp", "x"], ["stabstudy: command: must be one of sweep, report, ingest, export, status, got"]),
        ("stabstudy", ["status", "a", "b"], ["status: study: give one name or folder, got a, b"]),
        ("stabstudy", ["status", "a", "--lst"], ["status: --lst: is not a flag"]),
        ("sweep", ["--list", "--dry-run"], ["conf: --dry-run: not allowed with argument --list"]),
        ("sweep", ["--dry-run", "--status"], ["conf: --status: not allowed with argument --dry-run"]),
        ("sweep", ["depth_lr"], ["conf: depth_lr: is not an override: did you mean sweep=depth_lr? (from override"]),
        ("sweep", ["sweeps/depth_lr.yaml"], ["conf: sweeps/depth_lr.yaml: is not an override: did you mean sweep=d"]),
        ("sweep", ["sweep=sweeps/depth_lr.yaml"], ["conf: sweep: there is no such sweep (did you mean depth_lr"]),
        ("stabstudy", ["sweep", "--dryrun", "--lisst"], ["conf: --dryrun: is", "conf: --lisst: is not a flag (did"]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_a_line_each(name: str, arguments: list[str], lines: list[str], capsys: Out) -> None:
    assert MAINS[name](arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == len(lines)
    for line, start in zip(said.err.splitlines(), lines, strict=True):
        assert line.startswith(f"error: {start}")


def test_at_most_twenty_lines(capsys: Out) -> None:
    assert sweep.main([f"--x{i}" for i in range(30)]) == 2
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == cli.MAX_ERRORS == 20 and last == "error: and 10 more"


def test_flags_may_stand_anywhere_and_the_rest_keeps_its_order() -> None:
    parser = cli.Parser("x", "text")
    parser.add_argument("--list", action="store_true")
    flags, rest = parser.parse_flags(["b=1", "--list", "a=-1", "b=2"])
    assert flags.list and rest == ["b=1", "a=-1", "b=2"]
    with pytest.raises(ConfigError):
        parser.parse_flags(["a=1", "-5"])


def test_studies_and_flags_may_be_mixed(tmp_path: Path) -> None:
    folders = [planted.plant_study(tmp_path / n, depths=(2,), lrs=(1e-3,), seeds=(0,)) for n in "ab"]
    assert report.main([str(folders[0]), "--out", str(tmp_path / "out"), str(folders[1])]) == 0
    assert (tmp_path / "out" / "index.html").is_file()


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_the_flag_of_hydras_users_changes_nothing(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = []
    for arguments in (["optim.lr=1e-3,1e-2"], [flag, "optim.lr=1e-3,1e-2"], ["optim.lr=1e-3,1e-2", flag]):
        assert sweep.main([*arguments, "--dry-run"]) == 0
        printed.append(capsys.readouterr())
    assert printed[0] == printed[1] == printed[2]


# the script


@pytest.mark.parametrize("name", MAINS)
def test_the_version(name: str, capsys: Out) -> None:
    assert MAINS[name](["--version"]) == 0
    assert capsys.readouterr().out == f"stabstudy {stabstudy.__version__}\n"


def test_the_package_has_no_other_lazy_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        stabstudy.nothing  # noqa: B018


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_without_a_command_it_names_them(arguments: list[str], capsys: Out) -> None:
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in ("sweep", "report", "ingest", "export", "status"))


def test_each_command_is_reached_with_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[tuple[str, list[str]]] = []
    for name, module in (("sweep", sweep), ("report", report), ("ingest", ingest)):
        monkeypatch.setattr(module, "main", lambda argv, name=name: reached.append((name, argv)) or len(reached))
    calls = [["sweep", "a=1"], ["report", "x", "--out", "y"], ["ingest"]]
    assert [cli.main(call) for call in calls] == [1, 2, 3]
    assert reached == [(name, rest) for name, *rest in calls]


def test_status_takes_a_name_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.chdir(tmp_path)
    planted.plant_study(tmp_path / "results" / "2024", depths=(2,), lrs=(1e-3, 0.1), seeds=(0,))
    planted.plant_study(tmp_path / "else where" / "s", depths=(2,), lrs=(1e-3,), seeds=(0,))
    printed = []
    for arguments in (
        ["sweep", "--status", "study=2024"],
        ["status", "2024"],
        ["status", "results/2024/"],
        ["status", str(tmp_path / "results" / "2024")],
        ["status", "study=2024"],
    ):
        assert cli.main(arguments) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0].splitlines()[-1].startswith("2024: 2 trials: 2 done") and set(printed) == {printed[0]}
    for folder in ("else where/s", str(tmp_path / "else where" / "s")):
        assert cli.main(["status", folder]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("s: 1 trial: ")


def test_status_takes_a_folder_that_is_not_in_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    for folder, seeds in (("s", (0,)), ("twice", (0,)), ("results/twice", (0, 1))):
        planted.plant_study(tmp_path / folder, depths=(2,), lrs=(1e-3,), seeds=seeds)
    monkeypatch.chdir(tmp_path)
    for argument, start in (("s", "s: 1 "), ("./s/", "s: 1 "), ("twice", "twice: 2 "), ("./twice", "twice: 1 ")):
        assert cli.main(["status", argument]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"{start}trial")
    monkeypatch.chdir(tmp_path / "s" / "trials")
    assert cli.main(["status", ".."]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("s: 1 trial")


def test_the_help_of_status_is_its_own(capsys: Out) -> None:
    assert cli.main(["status", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: stabstudy status ")


@pytest.mark.parametrize("name", ["nothing", "results", "no/where", "a b", "it's", ".", ".."])
def test_status_of_what_is_no_study(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and list(tmp_path.iterdir()) == []


def test_status_without_a_name_is_that_of_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["status"]) == 2
    assert f"{tmp_path}/results/quickstart: is not a study" in capsys.readouterr().err


def test_as_a_process_of_its_own(tmp_path: Path) -> None:
    done = script("sweep", "--list", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "quickstart" in done.stdout
    done = script("report", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: report: nowhere: is not a study")


HEAVY = """
import sys
from stabstudy import cli
code = cli.main(sys.argv[1:])
heavy = {"torch", "ray", "pandas", "matplotlib", "scipy", "transformers", "datasets", "optuna", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
raise SystemExit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["sweep", "--help"], 0),
        (["report", "--help"], 0),
        (["ingest", "--help"], 0),
        (["export", "--help"], 0),
        (["sweep", "--list"], 0),
        (["sweep", "--dry-run"], 0),
        (["sweep", "optim.lr=nan"], 2),
        (["status", "nothing"], 2),
        (["report", "nowhere"], 2),
        (["ingest", "nowhere", "--study", "s"], 2),
        (["export", "nowhere", "--to", "wandb"], 2),
    ],
)
def test_what_answers_without_work_imports_nothing_heavy(arguments: list[str], code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HEAVY, *arguments]
    environment = {**os.environ, "STABSTUDY_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == code, done.stderr


def test_the_block_for_heavy_imports_can_fail(tmp_path: Path) -> None:
    code = HEAVY.replace("from stabstudy import cli", "from stabstudy import cli\nimport pandas")
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pandas" in done.stderr
