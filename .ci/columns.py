"""Tables of results/README.md, written from the definitions of the columns.

python .ci/columns.py           writes them between their marks
python .ci/columns.py --check   exits with 1 where the page is not what would be written
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stabstudy import config as cfg
from stabstudy.analysis.table_columns import OWN, OWN_OF_SPIKES, spike_kinds, trial_kinds
from stabstudy.stability.columns import COLUMNS, SPIKES
from stabstudy.trace import KTO, PROBES, TRACE, Schema

PAGE = Path(__file__).resolve().parent.parent / "results" / "README.md"
TYPES = {"int": "whole number", "float": "number", "text": "text", "floats": "list of numbers", "bool": "true/false"}


def page(text: str) -> str:
    """The page with every marked part written anew. Raises KeyError for a mark that has no part."""
    parts = {
        "trace": _record(TRACE),
        "kto": _record(replace(TRACE, columns=KTO)),
        "probes": _record(PROBES),
        "own": _table(("column", "type", "meaning"), ((f"`{n}`", TYPES[c.kind], c.meaning) for n, c in OWN.items())),
        "settings": "\n".join(_settings()),
        "statistics": _statistics(),
        "spikes": _spikes(),
    }
    pattern = r"(<!-- (\w+): written by \.ci/columns\.py -->\n).*?(\n<!-- end -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{parts[m[2]]}{m[3]}", text, flags=re.DOTALL)


def _record(schema: Schema) -> str:
    rows = ((f"`{c.name}`", TYPES[c.kind], c.unit, "yes" if c.nullable else "no", c.meaning) for c in schema.columns)
    return _table(("column", "type", "unit", "null", "meaning"), rows)


def _settings() -> Iterator[str]:
    for group in cfg.GROUPS:
        names = [f"`{name}`" for name in cfg.setting_names() if name.startswith(f"{group}.")]
        yield f"- `{group}`: {', '.join(names)}"


def _statistics() -> str:
    kinds = trial_kinds([])
    rows = ((f"`{n}`", TYPES[kinds[n]], d.unit, d.meaning, d.null_when) for n, d in COLUMNS.items())
    return _table(("column", "type", "unit", "meaning", "null when"), rows)


def _spikes() -> str:
    meanings = {n: ("", c.meaning, "never") for n, c in OWN_OF_SPIKES.items()}
    meanings |= {n: (d.unit, d.meaning, d.null_when) for n, d in SPIKES.items()}
    rows = ((f"`{n}`", TYPES[kind], *meanings[n]) for n, kind in spike_kinds().items())
    return _table(("column", "type", "unit", "meaning", "null when"), rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([c.replace("|", "\\|") for c in row] for row in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return text.replace("| --- ", "|---").replace("--- |", "---|")


def main() -> int:
    """Write the page, or check it."""
    before = PAGE.read_text(encoding="utf-8")
    after = page(before)
    if "--check" in sys.argv[1:]:
        if after != before:
            print(f"{PAGE.name} is not what the definitions say: run python .ci/columns.py")
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
