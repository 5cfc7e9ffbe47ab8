"""The trials of a plan as earlier launches left them: which may go on, and which have files that are not ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stabstudy import disk, store
from stabstudy.planning.plan import Plan, PlannedTrial


def intact(plan: Plan, study: store.StudyFolder) -> tuple[Plan, list[str]]:
    """The plan without the trials whose files cannot be trusted, and a line for each of those, which are left alone.

    Raises store.NewerFormatError where a newer version wrote a file of the study: it would be written over.
    """
    for path in (study.provenance_file, *(study.trial(t.trial_id).config_file for t in plan.trials)):
        _refuse_newer(path)
    reasons = {trial.trial_id: _damage(study.trial(trial.trial_id)) for trial in plan.trials}
    trials = tuple(trial for trial in plan.trials if reasons[trial.trial_id] is None)
    return dataclasses.replace(plan, trials=trials), [reason for reason in reasons.values() if reason]


def waiting(plan: Plan, study: store.StudyFolder) -> list[PlannedTrial]:
    """The trials of an intact plan that are not done; all of them while there is no study yet."""
    return [t for t in plan.trials if study.trial(t.trial_id).read_state().status != "done"]


def _refuse_newer(path: Path) -> None:
    """Raises NewerFormatError for a file of a newer version. A broken one is no reason: it is written anew."""
    try:
        store.read_sealed(path)
    except store.NewerFormatError:
        raise
    except store.StoreError:
        return


def _damage(folder: store.TrialFolder) -> str | None:
    """Why nothing may be written into the trial's folder; None where it is as a launch left it, or not there yet.

    A config.json that was changed is no reason: the plan knows what it must be.
    """
    if wrong := disk.trial_obstacle(folder.path):
        return wrong
    try:
        folder.read_state()
    except store.NewerFormatError:
        raise
    except store.StoreError as error:
        return str(error)
    return None
