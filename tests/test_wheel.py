"""A built wheel carries conf/ and sweeps/: the command works from any folder, without the checkout."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder / "dist")], check=True, capture_output=True, cwd=ROOT)
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *arguments: str) -> str:
    """Output of the command of the unpacked wheel, which must be the one that ran."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import runpy, stabstudy as s; print(s.__file__); runpy.run_module('stabstudy.sweep', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    origin, _, said = done.stdout.partition("\n")
    assert Path(origin).is_relative_to(installed), "the checkout was run, not the wheel"
    return said


def test_the_wheel_holds_every_preset_and_sweep(installed: Path):
    for folder in ("conf", "sweeps"):
        here = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*.yaml")}
        there = {p.relative_to(installed / "stabstudy") for p in (installed / "stabstudy" / folder).rglob("*.yaml")}
        assert here == there
    assert not (installed / "conf").exists() and not (installed / "sweeps").exists()


def test_list_and_dry_run_from_another_folder(installed: Path, tmp_path: Path):
    said = run(installed, tmp_path, "--list")
    assert "quickstart" in said and "lingua_depth_cpu" in said
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text(
        "# @package _global_\n# Is mine found?\nsweep: {grid: {optim.lr: [0.1, 0.2], data: [pysrc, synthetic]}}\n"
    )
    assert "Is mine found?" in run(installed, tmp_path, "--list")
    assert "4 trials of 4 cells: 0 done, 4 to do" in run(installed, tmp_path, "sweep=mine", "--dry-run")
    assert "quickstart: How rough" in run(installed, tmp_path, "--dry-run")
    assert "optim=adamw" in run(installed, tmp_path, "--help")


def test_the_version_is_the_packages(installed: Path, tmp_path: Path):
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(installed, tmp_path, "--version").strip() == f"stabstudy {wanted}"


def test_the_wheel_is_typed_and_names_its_extras(installed: Path):
    assert (installed / "stabstudy" / "py.typed").is_file()
    (file,) = installed.glob("stabstudy-*.dist-info/METADATA")
    head = email.message_from_string(file.read_text())
    assert {"train", "ray", "search", "all", "test", "dev"} <= set(head.get_all("Provides-Extra", []))
    base = [line for line in head.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert base and not [line for line in base if re.match(r"(torch|ray|optuna|scikit-learn|transformers)\b", line)]
    assert list(installed.glob("stabstudy-*.dist-info/licenses/LICENSE"))


def test_the_sdist_holds_what_is_tested_and_read(tmp_path: Path):
    """Whoever has it can run the tests, read the documents, and build the same wheel."""
    build = "import sys; from hatchling.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(tmp_path, **safe)
    root = sdist.with_name(sdist.name.removesuffix(".tar.gz"))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked or ["LICENSE", "README.md", "CHANGELOG.md", "tests/test_wheel.py", "conf/trial.yaml"]:
        assert (root / name).is_file() or not (ROOT / name).exists(), name
    assert not list(root.rglob("__pycache__")) and not (root / ".git").exists()
    wheel = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", wheel, str(tmp_path / "dist")], check=True, capture_output=True, cwd=root)
    (made,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(made).namelist())
    assert {"stabstudy/py.typed", "stabstudy/conf/trial.yaml", "stabstudy/sweeps/quickstart.yaml"} <= names
