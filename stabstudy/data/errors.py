"""The error for data that cannot be used."""

from __future__ import annotations

from stabstudy.settings import Problem


class DataError(Exception):
    """Data, or a setting of it, that cannot be used: one line with setting, rule, value; file and line where known.

    `problem` is the same as a `config.Problem`, to be listed with the other problems of a launch.
    """

    def __init__(self, setting: str, rule: str, got: str = ""):
        super().__init__(setting, rule, got)  # all three, so that it survives pickling between processes
        self.problem = Problem(setting, rule, got)

    def __str__(self) -> str:
        return str(self.problem)
