"""Constraints that pin every requirement of pyproject.toml to its floor: pip install -c FILE -e ".[test]"."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]

for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
    for line in lines:
        if floor := re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", line):  # not our own extras
            print(f"{floor[1]}=={floor[2]}")
