"""The study that ingested runs make: whether a folder may hold it, and what is written there."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from stabstudy import config as cfg
from stabstudy import entries, locks, store
from stabstudy.ingesting import runs
from stabstudy.ingesting.runs import Run

QUESTION = "Runs trained elsewhere, read from their logs."
KIND = "ingested"


def open_for(path: Path, name: str) -> store.StudyFolder:
    """The folder of the study, which need not exist. Raises StoreError where it may not become one, or is another's."""
    if rule := store.check_name(name):
        raise store.StoreError(f"--study {name!r}: {rule}")
    study = store.StudyFolder(path)
    if path.is_symlink():
        raise store.StoreError(f"{path}: is a link, results are written to real folders only")
    if not path.exists():
        return study
    if not path.is_dir():
        raise store.StoreError(f"{path}: is a file")
    if study.provenance_file.exists() and store.read_sealed(study.provenance_file).get("kind") == KIND:
        return study
    if study.sweep_file.exists():
        raise store.StoreError(f"{path}: holds the study of a sweep: choose another name with --study NAME")
    if any(not p.name.startswith(".") for p in path.iterdir()):
        raise store.StoreError(f"{path}: is not a study of this program, and not empty")
    return study


def write(study: store.StudyFolder, found: Sequence[Run], argv: Sequence[str]) -> Counter[str]:
    """Write every run as a trial; how many are new, changed and unchanged. Raises LockHeldError or OSError."""
    entries.check_ingested(study.path, [study.trial(run.trial_id).path for run in found])
    study.path.mkdir(parents=True, exist_ok=True)
    with locks.lock(study.path):
        if not study.provenance_file.exists():  # first, so that a folder half written is known as ours
            store.write_sealed(study.provenance_file, _provenance(study, argv))
        outcomes = Counter(runs.write(study, run) for run in found)
        if outcomes.keys() - {"unchanged"}:
            store.write_sealed(study.provenance_file, _provenance(study, argv))
    return outcomes


def _provenance(study: store.StudyFolder, argv: Sequence[str]) -> dict[str, object]:
    return {
        "format": cfg.FORMAT_VERSION,
        "kind": KIND,
        "study": study.name,
        "question": QUESTION,
        "argv": list(argv),
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in ("stabstudy", "pyarrow")}},
    }
