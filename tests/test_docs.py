"""README, CONTRIBUTING and docs/ say what is there: commands, options, links, paths, settings, modules, words."""

from __future__ import annotations

import ast
import contextlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

from stabstudy import config as cfg
from stabstudy import export, ingest, report, sweep
from stabstudy.analysis import plots
from stabstudy.analysis.study import Study
from stabstudy.extras import EXTRAS
from stabstudy.planning import compute
from stabstudy.state import STATUSES

README = ROOT / "README.md"
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "results/README.md", "benchmarks/README.md")]
PAGES = [README, *OTHERS, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
PROSE = {name: re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE) for name, text in TEXTS.items()}
page = pytest.mark.parametrize("name", TEXTS)

COMMAND = r"python -m stabstudy\.(sweep|report|ingest|export)((?: [^\n`#|&]*)?)"


def test_the_readme_is_one_page_with_its_two_commands() -> None:
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 130
    assert '\npip install -e ".[all]" && python -m stabstudy.sweep\n' in text
    assert '\npip install -e ".[test]" && pytest\n' in text


# commands


def commands(module: str) -> list[str]:
    """Arguments of every command of the module on any page, at the start of a line or by itself in a sentence."""
    found = [
        (match[1], match[2].strip())
        for text in TEXTS.values()
        for match in re.finditer(rf"(?:^|`){COMMAND}", text, flags=re.MULTILINE)
    ]
    return sorted({words for name, words in found if name == module and not re.search(r"[$<]|\.\.\.|NAME", words)})


@pytest.mark.parametrize("words", commands("sweep"))
def test_sweep_commands_plan(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [w for w in shlex.split(words) if w != "--status"]
    assert sweep.main([*given, *([] if "--list" in given else ["--dry-run"])]) == 0


def test_there_are_commands() -> None:
    assert all(
        len(commands(module)) >= few for module, few in (("sweep", 6), ("report", 3), ("ingest", 1), ("export", 2))
    )


@pytest.mark.parametrize(
    ("module", "main"),
    [("sweep", sweep.main), ("report", report.main), ("ingest", ingest.main), ("export", export.main)],
)
def test_flags_are_those_of_the_command(
    module: str, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        main(["--help"])
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    used = {flag for words in commands(module) for flag in re.findall(r"(?<!\S)--[a-z-]+", words)}
    assert used and used <= shown


def test_exit_codes_are_those_of_the_commands_and_stand_once() -> None:
    from stabstudy import cli

    (table,) = (part.split("\n\n")[0] for text in TEXTS.values() for part in text.split("| exit code | |")[1:])
    codes = [int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")]
    assert len(codes) == len(set(codes)) and set(codes) == set(cli.EXIT_CODES)


def test_extras_are_those_of_pyproject_and_stand_once() -> None:
    (table,) = (part.split("\n\n")[0] for text in TEXTS.values() for part in text.split("| extra | ")[1:])
    rows = [[cell.strip() for cell in row.split(" |")] for row in table.splitlines()[2:]]
    brought = {name: re.findall(r"`([\w-]+)`", row[2]) for row in rows[1:] for name in re.findall(r"`(\w+)`", row[0])}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert list(brought) == list(listed)
    for name, packages in brought.items():
        if name in EXTRAS:
            assert packages == [re.match(r"[\w-]+", line)[0] for line in listed[name]]  # type: ignore[index]


def test_the_console_script_has_the_commands_that_the_readme_names() -> None:
    from stabstudy import cli

    sentence = re.search(r"^(`stabstudy \w+`.*?) are the same commands", TEXTS["README.md"], re.DOTALL | re.MULTILINE)
    assert sentence is not None
    assert re.findall(r"`(?:stabstudy )?(\w+)`", sentence[1]) == [*cli.COMMANDS]


def test_what_the_changelog_says_has_moved_is_where_it_says() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  \| (.*`stabstudy.*) \| (.*) \|$", text, flags=re.MULTILINE)
    moved, there = ({name for row in rows for name in re.findall(r"`(stabstudy\.[\w.]+)`", row[k])} for k in (0, 1))
    assert len(rows) >= 8 and all(find_spec(name) for name in there)
    assert [name for name in moved - there if find_spec(name)] == ["stabstudy.store"]  # two of its names alone


# links and paths


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(text: str, folder: Path) -> list[str]:
    """The relative links and pictures of a page in this folder that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = folder / path if path else None
            there = file is None or file.exists()
            known = (
                anchors(text if file is None else file.read_text(encoding="utf-8")) if there and anchor else {anchor}
            )
            broken += [] if there and anchor in known else [target]
    return broken


@page
def test_relative_links_resolve(name: str) -> None:
    assert broken_links(PROSE[name], (ROOT / name).parent) == []


def test_a_broken_link_is_found() -> None:
    text = "# A b\n[1](docs/nothing.md) [2](README.md#no-such-heading) [3](#a-b) [4](README.md#two-commands) [5](#c)"
    assert broken_links(text, ROOT) == ["docs/nothing.md", "README.md#no-such-heading", "#c"]


FOLDERS = ("stabstudy", "conf", "sweeps", "tests", "docs", "benchmarks", "notebooks", r"\.ci", r"\.github")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*|results/(?:README\.md|example[\w./-]*))`")


def missing_paths(text: str) -> list[str]:
    """Paths of this repository in backticks that are not there, but for files that a change would add."""
    new = set(re.findall(r"^New file `([^`]+)`", text, flags=re.MULTILINE))
    return [path for path in PATH.findall(text) if path not in new and not (ROOT / path).exists()]


@page
def test_paths_exist(name: str) -> None:
    assert missing_paths(PROSE[name]) == []


def test_a_missing_path_is_found() -> None:
    text = "`stabstudy/nothing.py`, `conf/`, `results/study/trials`, `stabstudy/new.py`\n\nNew file `stabstudy/new.py`:"
    assert missing_paths(text) == ["stabstudy/nothing.py"]


SETTING = re.compile(rf"(?<![\w./]){'(' + '|'.join((*cfg.GROUPS, 'compute')) + ')'}((?:\.[a-z]\w*)+)\b(?!\()")


def unknown_settings(text: str) -> list[str]:
    """Dotted names of settings in backticks or code that are none."""
    known = {*cfg.setting_names(), *compute.names()}
    code = re.findall(r"`[^`\n]+`", text) + re.findall(r"^```.*?^```$", text, flags=re.DOTALL | re.MULTILINE)
    names = {group + key for part in code for group, key in SETTING.findall(part)}
    files = (".py", ".yaml", ".md", ".parquet", ".json")
    return sorted(n for n in names - known if not n.endswith(files) and not any(k.startswith(f"{n}.") for k in known))


@page
def test_settings_exist(name: str) -> None:
    assert unknown_settings(TEXTS[name]) == []


def test_an_unknown_setting_is_found() -> None:
    text = "`optim.lrr=1` `optim.lr=1` optim.none `config.optim.x` `model.py`\n```\ntrain.stepz: 3\n```"
    assert unknown_settings(text) == ["optim.lrr", "train.stepz"]


# what Python says


def python_blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", TEXTS[name], flags=re.DOTALL | re.MULTILINE)


def test_the_readmes_python_runs_on_the_committed_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = python_blocks("README.md")
    scope: dict[str, object] = {}
    exec(code, scope)  # noqa: S102
    assert isinstance(scope["study"], Study) and len(scope["study"].trials) == 27


def attributes(code: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


@pytest.mark.parametrize("name", ["README.md", "docs/reading.md"])
def test_what_is_asked_of_a_study_can_be_asked(name: str) -> None:
    used = {pair for block in python_blocks(name) for pair in attributes(block)}
    asked, drawn = ({attr for owner, attr in used if owner == name} for name in ("study", "plots"))
    assert len(asked) >= 5 and all(hasattr(Study, attr) for attr in asked)
    assert drawn and all(hasattr(plots, attr) for attr in drawn)


# lists that must be whole


def written(*arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    script = root / ".ci" / "modules.py"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


def test_the_list_of_modules_is_what_the_modules_say() -> None:
    done = written("--check")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = re.findall(r"^\| `([\w.]+)` \|", TEXTS["docs/modules.md"], flags=re.MULTILINE)
    there = [p.name for folder in ("stabstudy", "benchmarks", ".ci") for p in (ROOT / folder).rglob("*.py")]
    assert sorted(listed) == sorted(name for name in there if name != "__init__.py")


def test_a_new_module_is_noticed_and_listed(tmp_path: Path) -> None:
    for name in ("stabstudy", "benchmarks", ".ci", "docs"):
        (tmp_path / name).mkdir()
    (tmp_path / ".ci" / "modules.py").write_bytes((ROOT / ".ci" / "modules.py").read_bytes())
    assert written(root=tmp_path).returncode == 0 == written("--check", root=tmp_path).returncode
    (tmp_path / "stabstudy" / "x.py").write_text('"""A new thing.\n\nMore on it.\n"""\n')
    assert written("--check", root=tmp_path).returncode == 1
    assert written(root=tmp_path).returncode == 0
    assert "| `x.py` | A new thing |" in (tmp_path / "docs" / "modules.md").read_text().splitlines()
    (tmp_path / "stabstudy" / "y.py").write_text("y = 1\n")
    assert "y.py: a module begins with a line" in written(root=tmp_path).stderr


@pytest.mark.parametrize(
    ("pattern", "name"),
    [("sweeps/*.yaml", "docs/asking.md"), ("notebooks/*.ipynb", "docs/reading.md"), ("docs/*.md", "README.md")],
)
def test_every_file_of_a_kind_is_named(pattern: str, name: str) -> None:
    files = sorted(ROOT.glob(pattern))
    whole = {"sweeps": "`{0.stem}`", "notebooks": "`notebooks/{0.name}`", "docs": "(docs/{0.name})"}
    assert files and [f for f in files if whole[pattern.partition("/")[0]].format(f) not in TEXTS[name]] == []


def test_the_glossary_gives_each_word_one_meaning() -> None:
    text = TEXTS["docs/glossary.md"]
    words = [w.strip().lower() for row in re.findall(r"^\| \*\*(.+?)\*\*", text, re.MULTILINE) for w in row.split(",")]
    assert len(words) == len(set(words)) >= 25
    states = re.search(r"\*\*State\*\* \|[^|]*?: ([\w, ]+)\.", text)
    assert states is not None and set(states[1].split(", ")) == set(STATUSES)
