"""The search of a stability frontier: for each cell of the other axes, the largest value of one setting that holds.

The boundary, and what to try next, are `analysis.frontier`'s; here values become trials, and trials on disk become what
was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from stabstudy import config as cfg
from stabstudy import store
from stabstudy.planning.axes import Between
from stabstudy.planning.plan import PlannedTrial, Planner, Rest
from stabstudy.settings import ConfigError
from stabstudy.state import ENDED
from stabstudy.wording import short_value

if TYPE_CHECKING:
    from stabstudy.analysis.frontier import Edge

Row = dict[str, Any]

HOLD = {"stable": "is stable up to", "works": "works up to"}


class Frontier:
    """A pure function of the trials on disk; what it has read of done trials, which do not change, it keeps."""

    def __init__(self, planner: Planner, asked: Between):
        from stabstudy.analysis import frontier

        self.planner, self.asked = planner, asked
        low, high = asked.ends
        self.scale = frontier.Scale(asked.setting, low, high, asked.resolution, asked.log)
        self._planned: dict[tuple[int, Any], dict[int, PlannedTrial]] = {}
        self._values: dict[str, Any] = {}
        self._rows: dict[str, Row | None] = {}

    def known(self, study: store.StudyFolder) -> list[PlannedTrial]:
        """See `Strategy.known`."""
        return [trial for _, _, _, trial in self._on_disk(study)]

    def next(self, study: store.StudyFolder, room: int, given_up: Collection[str]) -> list[PlannedTrial]:
        """See `Strategy.next`. One trial of each open cell at least, however few fit at once."""
        from stabstudy.analysis import frontier, proposals

        taken: set[Any] = {(cell, value, seed) for cell, value, seed, _ in self._on_disk(study)}
        seen: Any = self._seen(study)
        room = max(room, sum(edge.status == "open" for edge in frontier.fit(seen, self.scale).values()))
        while asked := proposals.propose(seen, taken, self.scale, self.planner.seeds, room, self.asked.holds):
            places: list[Any] = list(asked)
            trials = [trial for place in places if (trial := self._trial(*place)) is not None]
            if trials:
                return trials
            taken |= set(places)
        return []

    def answer(self, study: store.StudyFolder) -> str:
        """See `Strategy.answer`."""
        from stabstudy.analysis import frontier

        edges = frontier.fit(self._seen(study), self.scale)
        parts = [f"{self._label(rest)}{_words(edges[cell])}" for cell, rest in enumerate(self.planner.rests)]
        return f"{self.asked.setting} {HOLD[self.asked.holds]}: {'; '.join(parts)}"

    def _label(self, rest: Rest) -> str:
        """The rest's levels on the axes that differ between the rests."""
        others = [_levels(other) for other in self.planner.rests]
        varying = [text for text in _levels(rest) if not all(text in other for other in others)]
        text = " ".join([*([rest.case] if rest.case else []), *varying])
        return f"{text}: " if text else ""

    def _trial(self, cell: int, value: Any, seed: int) -> PlannedTrial | None:
        """None for a value that breaks a rule between settings, as a width that its heads do not divide."""
        if (cell, value) not in self._planned:
            try:
                rest, seeds = self.planner.rests[cell], self.planner.seeds
                trials = self.planner.replicates(rest, {self.asked.setting: value}, seeds)
                self._planned[cell, value] = dict(zip(seeds, trials, strict=True))
            except ConfigError:
                self._planned[cell, value] = {}
        return self._planned[cell, value].get(seed)

    def _on_disk(self, study: store.StudyFolder) -> Iterator[tuple[int, Any, int, PlannedTrial]]:
        """Every trial in the folder that is one of this search, by its cell, value and seed."""
        there = {folder.trial_id for folder in study.trials()}
        for trial_id in there - self._values.keys():
            self._values[trial_id] = self._value(study.trial(trial_id))
        values = sorted({value for value in self._values.values() if value is not None})
        for value in values:
            for cell in range(len(self.planner.rests)):
                for seed in self.planner.seeds:
                    trial = self._trial(cell, value, seed)
                    if trial is not None and trial.trial_id in there:
                        yield cell, value, seed, trial

    def _value(self, folder: store.TrialFolder) -> Any:
        """The trial's value of the setting; None outside the range, and where its files cannot be trusted."""
        try:
            value = cfg.flat(folder.read_own()[0])[self.asked.setting]
        except store.StoreError:
            return None
        return value if value is not None and self.asked.low <= value <= self.asked.high else None

    def _seen(self, study: store.StudyFolder) -> dict[Any, Any]:
        """What was observed in each cell."""
        from stabstudy.analysis import holding

        rows: dict[int, list[Row]] = {cell: [] for cell in range(len(self.planner.rests))}
        for cell, _, _, trial in self._on_disk(study):
            if (row := self._row(study.trial(trial.trial_id))) is not None:
                rows[cell].append(row)
        return {cell: holding.observations(own, self.asked.setting, self.asked.holds) for cell, own in rows.items()}

    def _row(self, folder: store.TrialFolder) -> Row | None:
        """The row of a trial that has ended; None of one that has not, or whose files are damaged."""
        from stabstudy.analysis.tables import read_row

        if folder.trial_id not in self._rows:
            if folder.read_state().status not in ENDED:
                return None
            self._rows[folder.trial_id] = read_row(folder)
        return self._rows[folder.trial_id]


def _levels(rest: Rest) -> list[str]:
    return [f"{name.rpartition('.')[2]}={short_value(chosen.value)}" for name, chosen in rest.choices.items()]


def _words(edge: Edge) -> str:
    """'0.03 [0.027, 0.033]', 'beyond 1', 'not even 0.001'."""
    if not edge.n:
        return "nothing known"
    if edge.status == "beyond":
        return f"beyond {edge.estimate:.3g}"
    if edge.status == "below":
        return f"not even {edge.estimate:.3g}"
    return f"{edge.estimate:.3g} [{edge.low:.3g}, {edge.high:.3g}]"
