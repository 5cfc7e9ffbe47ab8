"""The README says what is there: its file tree, its commands, its settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stabstudy import sweep

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LISTED = (
    "sweeps/*.yaml",
    "stabstudy/**/*.py",
    "notebooks/*.ipynb",
    "benchmarks/*.py",
    "conf/*.yaml",
    "results/*.md",
    ".ci/*.py",
    "benchmarks/*.md",
)


def tree() -> dict[str, str]:
    """Path -> phrase, from the block under 'Files'."""
    block = README.split("## Files", 1)[1].split("```")[1]
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.strip("\n").splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        name, _, phrase = line.strip().partition("  ")
        folders = folders[:level]
        if name.endswith("/"):
            for folder in name.split():
                found["".join([*folders, folder])] = phrase.strip()
            folders.append(name)
        else:
            found["".join([*folders, name])] = phrase.strip()
    return found


def test_the_tree_lists_every_file_and_no_other() -> None:
    there = {str(p.relative_to(ROOT)) for pattern in LISTED for p in ROOT.glob(pattern)}
    there = {p for p in there if not p.endswith("__init__.py")}
    listed = {p for p in tree() if not p.endswith("/")}
    assert listed - {".ci/run"} == there
    assert all((ROOT / p).exists() for p in tree())


def test_every_file_has_a_phrase() -> None:
    assert [p for p, phrase in tree().items() if not phrase and not p.endswith("/")] == []


COMMANDS = re.findall(r"^python -m stabstudy\.sweep(.*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("words", COMMANDS)
def test_its_sweep_commands_plan(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [w for w in shlex.split(words) if w != "--status"]
    assert sweep.main([*given, *([] if "--list" in given else ["--dry-run"])]) == 0


def test_it_has_commands() -> None:
    assert len(COMMANDS) >= 5


def test_its_pictures_exist() -> None:
    assert all((ROOT / target).is_file() for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README))
