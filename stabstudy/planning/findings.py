"""The problems and warnings of a launch, collected while it is read, so that all of them are shown at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from stabstudy.settings import ConfigError, Problem, short


@dataclass(frozen=True)
class Findings:
    """Problems stop the launch; warnings are shown and the launch goes on. Each is kept once, in order."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, setting: str, rule: str, got: str = "", origin: str = "") -> None:
        """Note a problem; `origin` says where the value was written."""
        self.take([Problem(setting, rule, got)], origin)

    def take(self, problems: Iterable[Problem], origin: str = "") -> None:
        """Note problems found elsewhere."""
        for problem in problems:
            located = at(problem, origin)
            if located not in self.problems:
                self.problems.append(located)

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def stop(self) -> None:
        """Raise ConfigError if anything was refused so far."""
        if self.problems:
            raise ConfigError(self.problems)


def at(problem: Problem, origin: str) -> Problem:
    """The problem with the place of the value behind it; both of a readable length, whatever was typed."""
    if not origin:
        return problem
    where = short(origin)
    if problem.got:
        return replace(problem, got=f"{short(problem.got)} ({where})")
    return replace(problem, rule=f"{problem.rule} ({where})")
