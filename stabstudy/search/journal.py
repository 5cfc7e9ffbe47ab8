"""The journal of a search, `optuna.journal` in the study's folder: what optuna-dashboard opens.

    optuna-dashboard results/<study>/optuna.journal

A copy of what the trials' files say, written by Optuna's own JournalStorage: a trial for each suggestion, with its
`cell_id`. It is brought up to date whenever the search is asked. Where it is missing, torn (a process died while it
wrote, after which every later write would fail) or says something else, it is put aside as `optuna.journal.damaged` and
made anew, in one piece. It is never input to anything here.

Optuna guards the file by a second one, `optuna.journal.lock`, which a killed process leaves behind: it is removed by
the next writer after GRACE seconds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stabstudy import disk, store
from stabstudy.analysis import searches
from stabstudy.analysis.searches import Suggestion
from stabstudy.space import Search
from stabstudy.wording import first_line

GRACE = 3  # seconds; Optuna warns of less
MOST_BYTES = 2**28  # that are read to see whether it is whole
ASIDE = ".damaged"


class Mismatch(Exception):
    """A journal that does not say what the trials' files say."""


def write(path: Path, name: str, search: Search, suggestions: Sequence[Suggestion]) -> str | None:
    """Bring the journal of study `name` up to date. Returns a line where that failed: the search goes on without it."""
    if kind := disk.not_a_file(path):
        return f"{path}: is {kind}, not a file: optuna-dashboard has nothing to show"
    try:
        with searches.quiet():
            if not _update(path, name, search, suggestions):
                if path.exists():
                    path.replace(path.with_name(path.name + ASIDE))
                _make(path, name, search, suggestions)
    except Exception as error:  # Optuna's own errors are of every kind, and no search may end for its copy
        return f"{path}: cannot be written ({type(error).__name__}: {first_line(error)})"
    return None


def is_whole(path: Path) -> bool:
    """Whether every line of the file is one of Optuna's records, the last one too."""
    if path.stat().st_size > MOST_BYTES:
        return False
    content = path.read_bytes()
    try:
        records = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        return False
    return content.endswith(b"\n") and all(isinstance(record, dict) for record in records)


def _update(path: Path, name: str, search: Search, suggestions: Sequence[Suggestion]) -> bool:
    """Add what is new. Returns False where the journal is missing, torn, or says something else."""
    if not path.exists() or not is_whole(path):
        return False
    try:
        study = _opened(path, name, search)
        for suggestion, trial in zip(suggestions, _matched(study, search, suggestions), strict=True):
            if trial is None:
                study.add_trial(searches.frozen(suggestion, search))
            elif not trial.state.is_finished() and suggestion.state != "running":
                _end(study, trial, suggestion, search)
    except Exception:  # a record that Optuna cannot replay raises what it likes
        return False
    return True


def _opened(path: Path, name: str, search: Search) -> Any:
    """The study in the file. Raises Mismatch for another search, KeyError for none of this name."""
    import optuna

    study = optuna.load_study(study_name=name, storage=_storage(path))
    if [d.name == "MAXIMIZE" for d in study.directions] != [o.maximize for o in search.objectives]:
        raise Mismatch
    return study


def _storage(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path), GRACE)))


def _matched(study: Any, search: Search, suggestions: Sequence[Suggestion]) -> list[Any]:
    """For each suggestion its trial in the journal, or None where it has none yet.

    A trial that was never begun (the process died before it wrote the trial's files) is ended as failed. One that had
    failed and is tried again gets a new entry. Raises Mismatch for anything else that differs.
    """
    from optuna.trial import TrialState

    by_cell: dict[str, Any] = {}
    for trial in study.get_trials(deepcopy=False):
        by_cell[str(trial.user_attrs.get("cell_id"))] = trial
    trials = [by_cell.pop(suggestion.cell_id, None) for suggestion in suggestions]
    for trial in by_cell.values():
        if trial.state.is_finished() and trial.state != TrialState.FAIL:
            raise Mismatch
    for i, (suggestion, trial) in enumerate(zip(suggestions, trials, strict=True)):
        if trial is not None and trial.state == TrialState.FAIL and suggestion.state != "failed":
            trials[i] = None
        elif trial is not None and not _says(trial, suggestion, search):
            raise Mismatch
    for trial in by_cell.values():
        if not trial.state.is_finished():
            study.tell(trial.number, state=TrialState.FAIL)
    return trials


def _says(trial: Any, suggestion: Suggestion, search: Search) -> bool:
    """Whether the trial is the suggestion, as far as it goes."""
    entry = searches.frozen(suggestion, search)
    if trial.params != entry.params or trial.distributions != entry.distributions:
        return False
    if not trial.state.is_finished():
        return True
    if trial.state != entry.state or trial.constraints != entry.constraints:
        return False
    return suggestion.penalised or trial.values == entry.values  # a penalty is the worst value so far


def _end(study: Any, trial: Any, suggestion: Suggestion, search: Search) -> None:
    """End a running trial in the journal as the suggestion did."""
    import optuna

    entry, own = searches.frozen(suggestion, search), optuna.trial.Trial(study, trial._trial_id)
    for name, value in entry.constraints.items():
        own.set_constraint(name, value)
    own.set_user_attr("penalised", suggestion.penalised)
    study.tell(own, entry.values, state=entry.state)


def _make(path: Path, name: str, search: Search, suggestions: Sequence[Suggestion]) -> None:
    """Write the journal in one piece: whoever opens it sees the old one or the new one."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / path.name
        study = searches.new_study(search, storage=_storage(own), name=name)
        study.add_trials([searches.frozen(suggestion, search) for suggestion in suggestions])
        content = own.read_bytes()
    store.write_bytes(path, content)
