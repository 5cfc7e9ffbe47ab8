"""Provenance of a study, enough to run it again: question, axes, command, versions, machine, code."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

from stabstudy import config as cfg
from stabstudy import extras, locks
from stabstudy.planning import machine
from stabstudy.planning.plan import Plan

PACKAGES = ("stabstudy", "torch", "ray", "hydra-core", "numpy", "transformers")


def provenance(plan: Plan) -> dict[str, Any]:
    """The body of provenance.json, as of now."""
    return {
        "format": cfg.FORMAT_VERSION,
        "study": plan.study,
        "question": plan.question,
        "axes": {axis.name: list(axis.values) for axis in plan.axes},
        "conditions": None if plan.conditions is None else list(plan.conditions),
        "argv": list(plan.argv),
        "launcher": plan.launcher,
        "launched": locks.now(),
        "versions": {"python": platform.python_version(), **{p: extras.installed(p) for p in PACKAGES}},
        "machine": {"platform": platform.platform(), "cores": machine.cores(), "processor": _processor()},
        "git": _git(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _git() -> dict[str, str] | None:
    """Commit of the code and a hash of what differs from it; None outside a checkout or without git.

    Studies under results/ are not code: a change there is left out.
    """
    try:
        commit = _ask_git("rev-parse", "HEAD").strip()
        patch = _ask_git("diff", "HEAD", "--", ":(top)", ":(top,exclude)results")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty_patch": hashlib.sha256(patch.encode()).hexdigest()[:12] if patch else ""}


def _ask_git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
