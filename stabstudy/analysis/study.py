"""A study read back from its folder: its trials, cells, spikes and records as tables, and questions put to them.

Where a notebook starts:

    study = Study.load("results/example")
    study.trials                     # a row per trial
    study.cells                      # a row per cell: its seeds, aggregated
    study.compare("optim.clip", "spike_abs_rate")
    study.trace(study.worst())       # one trial, step by step
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import pandas as pd

from stabstudy.analysis import (
    compare,
    effects,
    frontiers,
    lookup,
    overview,
    sensitivity,
    shared_batches,
    step_table,
    study_statistics,
    survival,
    table_columns,
)
from stabstudy.analysis.levels import Level, at_level, axes_of, levels_of, plain, records
from stabstudy.analysis.tables import Damaged, Tables, joined, read_record, read_tables, write_tables
from stabstudy.external import ExternalLog, read_external
from stabstudy.stability.rules import Rules
from stabstudy.store import StoreError, StudyFolder, read_sealed
from stabstudy.trace import LOG, PROBES, DamagedRecord, Rows, of_objective

DEPTH = "model.depth"


class Study:
    """One study. Nothing is read before it is asked for, and each table is read once; load again to see new trials."""

    def __init__(
        self, folder: StudyFolder, tables: Tables | None = None, axes: Mapping[str, list[Level]] | None = None
    ):
        self.folder = folder
        self._tables, self._axes = tables, axes
        self.parts: dict[str, Study] = {}  # of `concat`: where the records lie

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """The study in this folder, also while it runs: see `lookup.study_folder`. Raises StoreError for none."""
        return cls(lookup.study_folder(Path(path)))

    @classmethod
    def concat(cls, studies: Sequence[Study], names: Sequence[str] | None = None) -> Study:
        """Several studies as one, whose first axis is `study`; its trials and cells are named <study>/<id>.

        What varies within one of them is an axis of the whole. Statistics keep the rules of their own study: see
        `comparison_page.warnings` for what may not be compared. `names`: others than their own. Raises ValueError for
        equal names or under two studies.
        """
        names = [study.name for study in studies] if names is None else list(names)
        if len(set(names)) < max(2, len(names)):
            raise ValueError(f"needs at least two studies of different names, got {', '.join(names) or 'none'}")
        whole = cls(studies[0].folder, joined({n: study.tables for n, study in zip(names, studies, strict=True)}))
        whole.parts = dict(zip(names, studies, strict=True))
        varied = dict.fromkeys(axis for study in studies for axis in study.axes)
        whole._axes = {"study": names} | {axis: levels_of(whole.trials[axis]) for axis in varied}
        return whole

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name  # "." has none of its own

    @cached_property
    def tables(self) -> Tables:
        return read_tables(self.folder) if self._tables is None else self._tables

    @property
    def rules(self) -> Rules:
        """What counts as a spike, and what makes a verdict, in this study."""
        return self.tables.rules

    @property
    def damaged(self) -> list[Damaged]:
        """Trials whose files cannot be trusted, with the reason. They are in no other table."""
        return self.tables.damaged

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the launch wrote about itself; empty where it wrote nothing, or what is there is not what it wrote."""
        try:
            return read_sealed(self.folder.provenance_file)
        except StoreError:
            return {}

    @property
    def question(self) -> str:
        """What the study asks, in one sentence; empty where nobody wrote it. See `overview.question`."""
        return overview.question(self)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row per trial, by trial_id: cell, seed, state, group choices, settings, statistics (results/README.md).

        Null is null, but a float that was not finite reads as NaN too: `nonfinite_steps` and `verdict` tell them apart.
        """
        return self.tables.trial_frame.set_index("trial_id")

    @cached_property
    def spikes(self) -> pd.DataFrame:
        """A row per spike, with the trial_id and cell_id it belongs to."""
        return self.tables.spike_frame

    @cached_property
    def axes(self) -> dict[str, list[Level]]:
        """What varies, seed excluded: a setting or group choice -> its levels, null last."""
        return axes_of(self.trials, self.tables.groups) if self._axes is None else dict(self._axes)

    @cached_property
    def cells(self) -> pd.DataFrame:
        """A row per cell, by cell_id; see `compare.cells`."""
        return compare.cells(self.trials, list(self.axes))

    @property
    def grid(self) -> Study:
        """The study without its named cases, where that leaves anything: what figures over axes show."""
        ids = set(self.trials.index[self.trials["case"].isna()])
        return self if len(ids) in (0, len(self.trials)) else self.part(ids)

    def where(self, fixed: Mapping[str, Level]) -> Study:
        """The part of the study at these levels of axes or other columns of `trials`, {"optim.lr": 1e-3}.

        Its remaining axes keep their levels, so a gap stays visible. Raises KeyError for no such column or level.
        """
        for name, value in fixed.items():
            column = self.names.axis_or_column(name, self.trials)
            self.names.level(name, value, self.axes[name] if name in self.axes else levels_of(column))
        kept = reduce(lambda trials, item: at_level(trials, *item), fixed.items(), self.trials)
        return self.part(set(kept.index), {k: v for k, v in self.axes.items() if k not in fixed})

    @cached_property
    def names(self) -> lookup.Names:
        """Its axes, levels, statistics and trials by name; what is misspelt is a KeyError with the nearest."""
        return lookup.Names(self.name, self.axes)

    def trial_id(self, beginning: str) -> str:
        """The id of the one trial that has it, or whose id begins so; every question about a trial takes either.

        Raises KeyError for none, and for several with the ids.
        """
        return beginning if beginning in self._rows else self.names.trial(beginning, self._rows)

    def row(self, trial_id: str) -> dict[str, Any]:
        """A trial's row of `trials` as a dictionary, null as None. Raises KeyError."""
        return {name: plain(value) for name, value in self._rows[self.trial_id(trial_id)].items()}

    def trace(self, trial_id: str, columns: Sequence[str] | None = None) -> Rows:
        """The trial's record, a row per optimizer step. Raises KeyError, or DamagedRecord where there is none.

        That of an ingested run has a row per logged step, the steps of its source. `columns`: those that are read.
        """
        if (rows := self._trace(trial_id := self.trial_id(trial_id), columns)) is None:
            raise DamagedRecord(f"trial {trial_id}: has no trace")
        return rows

    def steps(self, columns: str | Sequence[str]) -> pd.DataFrame:
        """These columns of every trial's trace as one table, a row per step; trials that have none are left out.

        Columns: `trial_id`, the axes, `seed`, `step` and what is asked for, a list as a column per entry, all of the
        types that `Rows.frame` has; null where a trial lacks it. Only these columns are read. Raises KeyError for no
        such column, DamagedRecord for a record that was damaged since the trials were read.

        Example:
            study.steps(["loss", "grad_norm"]).groupby(["optim.lr", "step"])["grad_norm"].median()
        """
        known = step_table.columns_of(row["objective.kind"] for row in self._rows.values())
        asked = [columns] if isinstance(columns, str) else columns
        wanted = [self.names.one_of(name, known, "column of a trace") for name in asked]
        records = ((trial_id, self._trace(trial_id, wanted)) for trial_id in self._rows)
        return step_table.table(self.trials[[*self.axes, "seed"]], records, wanted)

    def batch(self, trial_id: str, step: int, cache_dir: str | Path | None = None) -> pd.DataFrame:
        """What a step of a trial read: a row per sequence, with its first `document`, how many it touches, its `text`.

        The one question that needs more than the study's files: it reads the trial's data again. Raises KeyError for
        an unknown trial, ValueError for a step that it does not have or a trial that was trained elsewhere, and
        DataError where the data are gone, or are other data than those it was trained on.

        Example:
            study.batch(study.worst(), 126)
        """
        study, own = self.owner(trial_id)
        if study.ingested:
            raise ValueError(f"trial {own} was trained elsewhere: nobody knows what it read")
        return shared_batches.sequences(study.folder.trial(own), int(step), cache_dir)

    def log(self, trial_id: str) -> ExternalLog | None:
        """What an ingested run was read from; None for a trial of our own. Raises StoreError where that is gone."""
        study, own = self.owner(trial_id)
        trial = study.folder.trial(own)
        return read_external(trial.read_config(), trial.config_file) if study.ingested else None

    @cached_property
    def ingested(self) -> bool:
        """Whether its trials were read from logs of other trainers."""
        return bool(self.trials["log_format"].notna().any())

    def probes(self, trial_id: str) -> Rows | None:
        """What was measured at intervals: attention logits, validation loss. None where nothing was."""
        study, own = self.owner(trial_id)
        return read_record(study.folder.trial(own), PROBES)

    def compare(self, axis: str, metric: str = "final_loss", by: str | None = None) -> pd.DataFrame:
        """Each pair of levels of an axis, paired by seed and by all other axes; see `compare.levels`.

        `by`: another axis, for rows at each of its levels. Raises KeyError for no axis or statistic, ValueError for a
        count.
        """
        axis, metric = self.names.axis(axis), self.names.compared(metric)
        if by is not None:
            self.names.axes_beside(by, axis)
        return compare.levels(self.trials, list(self.axes), axis, metric, by)

    def effects(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """What each axis changed in each statistic, tested as one family: `p_holm`; see `effects.effects`."""
        return effects.effects(*self.tested(metrics))

    def claims(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of `effects`, with what may be stated of them: see `effects.claims`."""
        return effects.claims(*self.tested(metrics))

    def tested(self, metrics: Sequence[str] | None = None) -> tuple[pd.DataFrame, list[str], list[str]]:
        """What `effects.effects`, `contrasts`, `interactions` take: trials of the grid, its axes, statistics."""
        metrics = effects.reported(self.trials) if metrics is None else metrics
        known = [self.names.statistic(m) for m in ([metrics] if isinstance(metrics, str) else metrics)]
        grid = self.grid
        return compare.censored(grid.trials, known), list(grid.axes), known

    @cached_property
    def searched(self) -> frontiers.Frontier | None:
        """The frontier that the sweep searched, with every trial that made it; None for a grid."""
        return frontiers.recorded(self.folder, self.tables.trials, self.axes)

    def frontier(self, setting: str | None = None, holds: str | None = None) -> pd.DataFrame:
        """The largest value of a setting that holds, per cell of the other axes: `frontiers.table`.

        None: what the sweep searched, by its rule and the other one; without a search `optim.lr`, `stable`. The range
        of a setting that was not searched is that of its levels. Raises KeyError for no axis, ValueError for one
        without an order, or for no rule.
        """
        return frontiers.table(frontiers.chosen(self.searched, self.tables.trials, self.axes, setting, holds), holds)

    def largest_stable(self, setting: str = "optim.lr", by: str | None = None) -> pd.DataFrame:
        """The largest level of a setting at which training stays stable, per level of `by`; see `compare.limits`.

        `by` None: the depth, where that is another axis, else one row for the whole grid.
        """
        by = DEPTH if by is None and DEPTH in self.grid.axes and setting != DEPTH else by
        self.grid.names.axes_beside([] if by is None else [by], setting)
        return compare.limits(self.grid.trials, list(self.grid.axes), setting, by)

    @property
    def underperform(self) -> pd.Series[bool]:
        """By trial_id: whether it ended over 0.2 nat above the best at an equal budget; see `compare.underperform`."""
        return compare.underperform(self.trials)

    def sensitivity(self, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """LR sensitivity and what belongs to it, over the grid without named cases; see `sensitivity`.

        A row per combination of the levels of `by` (None: of every other axis), other axes averaged per seed.

        Example:
            study.sensitivity()
            study.sensitivity(by="model.qk_norm")[["model.qk_norm", "lrs", "lrs_se", "max_stable_lr", "reason"]]
        """
        grid = self.grid
        return sensitivity.by_recipe(grid.trials, list(grid.axes), grid.names.axes_beside(by, sensitivity.LR))

    def sensitivity_difference(self, axis: str, by: str | Sequence[str] | None = None) -> pd.DataFrame:
        """What each level of an axis does to LR sensitivity, against its first; see `sensitivity.differences`.

        Paired by seed; a row per combination of the levels of `by` too (None: of every other axis).
        """
        grid = self.grid
        (axis,) = grid.names.axes_beside(axis, sensitivity.LR)
        others = grid.names.axes_beside(by, sensitivity.LR, axis)
        return sensitivity.differences(grid.trials, list(grid.axes), axis, others)

    def logit_growth(self) -> pd.DataFrame:
        """How attention logits grow with the model, a row per learning rate; see `sensitivity.growth`."""
        return sensitivity.growth(self.grid.trials, list(self.grid.axes))

    def rate_model(self) -> survival.RateModel:
        """How the rate of spikes changes along every axis: `ratios`, or the `reason`; see `survival.rate_model`."""
        return survival.rate_model(self.grid.trials, list(self.grid.axes))

    def time_to_first_spike(self, by: str) -> survival.FirstSpikes:
        """Kaplan-Meier curves of the first spike per level of an axis: `levels`, `p`; see `survival.first_spikes`."""
        return survival.first_spikes(self.grid.trials, self.grid.names.axis(by), list(self.grid.axes))

    def first_spikes(self) -> dict[str, tuple[survival.FirstSpikes, float]]:
        """`time_to_first_spike` along every axis, each with its p corrected for all of them (Holm)."""
        return study_statistics.first_spikes(self.grid.trials, list(self.grid.axes))

    def batch_share(self) -> shared_batches.BatchShare:
        """How much of the roughness of the gradient norm is the batch; see `shared_batches.batch_share`."""
        return shared_batches.batch_share(self.tables.trials, self.tables.ratios)

    def batch_effects(self) -> pd.DataFrame:
        """How high each batch lifts the norms of the trials that read it, highest first (`shared_batches`)."""
        return shared_batches.batch_effects(self.tables.trials, self.tables.spikes, self.tables.ratios)

    def importance(self) -> pd.DataFrame:
        """The share of each statistic's variance that each axis explains; see `study_statistics.importance`."""
        return study_statistics.importance(self.grid.trials, list(self.grid.axes))

    @cached_property
    def outcomes(self) -> dict[str, int]:
        """How many trials have which verdict or state. Each trial, the damaged ones too, is counted once."""
        return study_statistics.outcomes(self._rows.values(), len(self.damaged))

    def worst(self) -> str | None:
        """The roughest done trial: the worst verdict, and of those the largest norm over median."""
        return next(iter(study_statistics.by_roughness(self._done)), None)

    def roughest(self, most: int) -> list[str]:
        """The roughest trial of each cell with an unstable trial, roughest first, at most so many; at least `worst`."""
        return study_statistics.roughest(self._done, most)

    def typical(self) -> str | None:
        """The done trial with the median of largest norm over median, those of the worst trial's cell left out."""
        return study_statistics.typical(self._done)

    def describe(self, trial_id: str) -> str:
        """The trial in words: its case, its level on each axis, its seed."""
        return overview.trial(self.row(trial_id), list(self.axes))

    @cached_property
    def _rows(self) -> dict[str, dict[str, Any]]:
        return {row["trial_id"]: row for row in self.tables.trials}

    @cached_property
    def rows_by_cell(self) -> dict[str, list[dict[str, Any]]]:
        """Each cell's trials, as `row` gives them, by seed."""
        rows = sorted(map(self.row, self._rows), key=lambda r: (r["seed"] is None, r["seed"] or 0, r["trial_id"]))
        cells = dict.fromkeys(row["cell_id"] for row in rows)
        return {cell: [row for row in rows if row["cell_id"] == cell] for cell in cells}

    @cached_property
    def spikes_by_trial(self) -> dict[str, list[dict[str, Any]]]:
        """Each trial's rows of `spikes`, null as None, by step; a trial without spikes is left out."""
        spikes: dict[str, list[dict[str, Any]]] = {}
        for row in records(self.spikes.sort_values(["start", "series"])):
            spikes.setdefault(row["trial_id"], []).append(row)
        return spikes

    @property
    def _done(self) -> dict[str, dict[str, Any]]:
        return {t: row for t, row in self._rows.items() if row["state"] == "done"}

    def part(self, ids: set[str], axes: Mapping[str, list[Level]] | None = None) -> Study:
        """These trials and their spikes; `axes` None: whatever still differs."""
        whole, kept = self.tables, self.trials[self.trials.index.isin(ids)]  # ten times cheaper than from the rows
        trials, spikes = ([r for r in rows if r["trial_id"] in ids] for rows in (whole.trials, whole.spikes))
        if axes is None and self.parts:  # of `concat`: what differs between the studies alone is no axis of the whole
            left = {name: [v for v in own if v in levels_of(kept[name])] for name, own in self.axes.items()}
            axes = {name: own for name, own in left.items() if len(own) > 1}
        part = Study(self.folder, Tables(whole.rules, whole.groups, trials, spikes, whole.ratios), axes)
        part.trials, part.parts = kept, self.parts
        return part

    def _trace(self, trial_id: str, columns: Sequence[str] | None = None) -> Rows | None:
        """The trial's trace, these columns of it; None where there is none yet."""
        study, own = self.owner(trial_id)
        schema = LOG if study.ingested else of_objective(study._rows[own]["objective.kind"])
        rows, log = read_record(study.folder.trial(own), schema, columns), study.log(own)
        return rows if rows is None or log is None else table_columns.in_source_steps(rows, log)

    def owner(self, trial_id: str) -> tuple[Study, str]:
        """The study in whose folder a trial lies, one of `concat` or this one, and the trial's id there."""
        name, _, own = (whole := self.trial_id(trial_id)).partition("/")
        return (self.parts[name], own) if own else (self, whole)

    def __repr__(self) -> str:
        return overview.text(self)

    def _repr_html_(self) -> str:
        return overview.html(self)


def update_tables(folder: StudyFolder, into: Path | None = None) -> Study:
    """Read every trial, write trials.parquet and spikes.parquet into the study or `into`; answers with the study."""
    write_tables(folder if into is None else StudyFolder(into), (study := Study(folder)).tables)
    return study
