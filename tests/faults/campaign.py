"""The record of a campaign: a row for each part that ran, and the table in README.md made of them.

python -m pytest -m faults --full --rows tests/faults/campaign.jsonl tests/faults/test_writer.py
PYTHONPATH=tests python -m faults.campaign          writes the table anew from the rows
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from faults.counts import COUNTS

HERE = Path(__file__).resolve().parent
ROWS, README = HERE / "campaign.jsonl", HERE / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"


@dataclass
class Part:
    """One part of a campaign: its injections, each with a random generator of its own, and the violations so far.

    It begins no further injection after `minutes`. As a context manager it appends its row to `rows` when it ends, and
    raises AssertionError where something was violated.
    """

    injection: str
    wanted: int
    seed: int
    rows: Path | None = None
    minutes: float = 25.0
    n: int = 0
    tried: int = 0
    violations: list[str] = field(default_factory=list)
    violated: set[int] = field(default_factory=set)

    def injections(self) -> Iterator[random.Random]:
        """A generator for each injection; what it draws depends on the seed and the injection's number alone."""
        limit = time.monotonic() + 60 * self.minutes
        while self.n < self.wanted and self.tried < 4 * self.wanted and time.monotonic() < limit:
            yield random.Random(f"{self.seed}:{self.tried}")
            self.n, self.tried = self.n + 1, self.tried + 1

    def count(self, struck: bool) -> None:
        """Whether this injection struck: a process that ended before it was to be killed does not count."""
        self.n -= not struck

    def check(self, holds: object, violation: str) -> None:
        """Count a violation unless this holds."""
        if not holds:
            self.add([violation])

    def add(self, violations: list[str]) -> None:
        self.violations += [f"injection {self.tried}: {violation}" for violation in violations]
        if violations:
            self.violated.add(self.tried)

    def __enter__(self) -> Part:
        self._began = time.monotonic()
        print(f"{self.injection}: seed {self.seed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.add([f"{type(error).__name__}: {error}"])
        body = {
            "injection": self.injection,
            "n": self.n,
            "violations": len(self.violated),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "seconds": round(time.monotonic() - self._began),
            "seed": self.seed,
            "first": [v[:200] for v in self.violations[:3]],
        }
        print(f"{self.injection}: {self.n} injections, {len(self.violated)} violations")
        if self.rows is not None:
            with self.rows.open("a", encoding="utf-8") as f:
                f.write(json.dumps(body) + "\n")
        if error is None:
            assert not self.violations, "\n".join([f"seed {self.seed}", *self.violations[:20]])


def commit() -> str:
    """The commit that is tested, with a + where the package differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short=9", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "../../stabstudy") else ""
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the last row of each injection; a part that has not run says so."""
    last = {row["injection"]: row for row in rows}
    lines = ["| injection | n | violations | date | commit | minutes |", "|---|---|---|---|---|---|"]
    for name, count in COUNTS.items():
        cells = [f"**{name}**: {count.what}"]
        if name in last:
            row = last[name]
            cells += [f"{row['n']:,} of {count.full:,}", str(row["violations"]), row["date"], row["commit"]]
            cells.append(f"{row['seconds'] / 60:.1f}")
        else:
            cells += [f"0 of {count.full:,}", "not yet run", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table of these rows in place of the one in it."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table(rows) + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8"), read(ROWS)), encoding="utf-8")
