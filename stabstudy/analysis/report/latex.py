"""Tables as LaTeX for a paper: `booktabs`, every special character escaped, numbers set as mathematics.

A file of these needs the package booktabs and a LaTeX of 2020 or later. Scripts other than Latin need XeLaTeX or
LuaLaTeX and a font that has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from stabstudy.analysis import adaptive, compare, words
from stabstudy.analysis.elements import Report, Table
from stabstudy.analysis.figures import labels
from stabstudy.analysis.levels import records
from stabstudy.analysis.study import Study
from stabstudy.stability.columns import COLUMNS
from stabstudy.stability.verdict import VERDICTS

CELLS = ("final_loss_capped", "grad_norm_log_sd", "spike_abs_rate", "attn_logit_peak")
"""Statistics in the table of cells."""

DIFFERENCES = "differences"
"""The section of a comparison whose tables are in tables.tex too."""

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "`": r"\textasciigrave{}",
    "–": "--", "—": "---", "…": r"\dots{}", "±": r"$\pm$", "×": r"$\times$", "→": r"$\to$", "≥": r"$\geq$",
    "≤": r"$\leq$", "∞": r"$\infty$", "●": r"$\bullet$", "▲": r"$\triangle$", "◆": r"$\diamond$", "✕": r"$\times$",
    "○": r"$\circ$", "⊘": r"$\oslash$", "\N{MINUS SIGN}": "$-$", "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip

_NUMBER = re.compile(r"(?<![\w.])([-+]?)(\d+(?:\.\d+)?)(?:e(-?\d+))?(?![\w])")
"""A number that stands alone: with a sign or a power of ten it is set as mathematics, else as it is."""


def latex(table: Table, label: str = "") -> str:
    """The table as a float with caption and, where given, a label to refer to it."""
    columns = "".join("r" if column in table.numeric else "l" for column in table.columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title)}.}}",
        *([rf"\label{{tab:{re.sub('[^a-zA-Z0-9:-]+', '-', label)}}}"] if label else []),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row(table.columns),
        r"\midrule",
        *map(_row, table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text that LaTeX prints as it is; its numbers with signs and powers as mathematics."""
    parts, end = [], 0
    clean = words.clean(text, 1000)
    for number in _NUMBER.finditer(clean):
        if number[1] or number[3]:
            parts += [_escaped(clean[end : number.start()]), _mathematics(*number.groups())]
            end = number.end()
    return "".join([*parts, _escaped(clean[end:])])


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)


def _mathematics(sign: str, mantissa: str, power: str | None) -> str:
    """`-0.05`, `3` times ten to the power of -3, ten to the power of 4; as mathematics."""
    if power is None:
        return f"${sign}{mantissa}$"
    factor = "" if mantissa == "1" else rf"{mantissa}\times "
    return f"${sign}{factor}10^{{{power}}}$"


def _row(fields: Iterable[str]) -> str:
    """A row; one that begins with a bracket would be taken for the space below the one before."""
    texts = [escape(field) for field in fields]
    return " & ".join(f"{{}}{text}" if text.startswith(("[", "*")) else text for text in texts) + r" \\"


def tables(study: Study) -> Iterator[tuple[str, Table]]:
    """What a paper states of a study, each with its label: means of cells, counts of verdicts, effects of axes."""
    rows = records(study.cells.reset_index())
    if not rows:
        return
    has_cases = any(row["case"] for row in rows)
    heads = (*(["case"] if has_cases else []), *map(words.heading, study.axes))
    names = [_names(row, [*study.axes])[not has_cases :] for row in rows]
    shown = [m for m in CELLS if any(row[m] is not None for row in rows)]
    statistics = [labels.statistic(m, study.trials) for m in shown]
    means = (
        (*name, str(row["n_done"]), *(_mean(row, m) for m in shown)) for name, row in zip(names, rows, strict=True)
    )
    title = "Means over the seeds of each cell (geometric of norms, ratios and logits), with the 95 % interval"
    yield "cells", Table(title, (*heads, "n", *statistics), tuple(means), frozenset(("n", *statistics)))
    counts = ((*name, *(str(row[v]) for v in (*VERDICTS, "n_done"))) for name, row in zip(names, rows, strict=True))
    yield (
        "verdicts",
        Table("Verdicts of each cell", (*heads, *VERDICTS, "n"), tuple(counts), frozenset((*VERDICTS, "n"))),
    )
    if study.grid.axes and not study.parts and not study.ingested and adaptive.why_biased(study) is None:
        yield "effects", _effects(study)


def _effects(study: Study) -> Table:
    """The effect of each axis on each statistic, with its interval and p."""
    nats = compare.in_nats(study.trials)
    rows = [row for row in records(study.claims()) if row["estimate"] is not None]
    fields = (
        (
            words.label(row["axis"]),
            f"{words.level(row['a'], row['axis'])} → {words.level(row['b'], row['axis'])}",
            labels.name(row["metric"]),
            words.change(row, nats=nats),
            *(words.number(row[p], 2) for p in ("p", "p_holm")),
        )
        for row in rows
    )
    tests = words.count(sum(row["p_holm"] is not None for row in rows), "test")
    title = f"Effect of each axis with its 95 % interval; seeds are blocks, p corrected (Holm) for {tests}"
    heads = ("axis", "from → to", "statistic", "effect", "p", "p (Holm)")
    return Table(title, heads, tuple(fields), frozenset(heads[-2:]))


def _names(row: dict[str, object], axes: list[str]) -> tuple[str, ...]:
    case = row["case"]
    return words.clean(case, 40) if case else words.NOTHING, *(words.level(row[a], a) for a in axes)


def _mean(row: dict[str, object], metric: str) -> str:
    if COLUMNS[metric].unit == "fraction":
        return words.percent(row[metric])
    return words.estimate(row[metric], row[f"{metric}_low"], row[f"{metric}_high"])


def document(study: Study, report: Report) -> str:
    """The file tables.tex: `tables` of the study, and of a comparison those of its differences."""
    own = list(tables(study))
    differences = [b for s in report.sections if s.anchor == DIFFERENCES for b in s.blocks if isinstance(b, Table)]
    own += [(f"{DIFFERENCES}-{i}", table) for i, table in enumerate(differences, start=1)]
    head = f"% Tables of {words.clean(report.study, 200)}. Needs \\usepackage{{booktabs}}.\n"
    return "\n".join([head, *(latex(table, label) for label, table in own)])
