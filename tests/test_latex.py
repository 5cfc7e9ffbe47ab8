"""Tables as LaTeX: what is typed is what is printed, and the structure holds whatever a study is called."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import planted
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy.analysis.elements import Section, Table
from stabstudy.analysis.report import comparison_page, latex, publish, study_page
from stabstudy.analysis.study import Study

PRINTED = {
    r"\textbackslash{}": "\\", r"\textasciicircum{}": "^", r"\textasciitilde{}": "~", r"\textless{}": "<",
    r"\textgreater{}": ">", r"\textbar{}": "|", r"\textasciigrave{}": "`", r"\{": "{", r"\}": "}", r"\$": "$",
    r"\&": "&", r"\#": "#", r"\%": "%", r"\_": "_", r"$\pm$": "±", r"$\to$": "→",
}  # fmt: skip
"""What TeX prints for each command that may stand in a field, by the LaTeX companion, not by the table in the code."""

TOKEN = re.compile(
    "|".join(map(re.escape, sorted(PRINTED, key=len, reverse=True)))
    + r"|\$(?P<sign>[-+]?)(?:(?P<factor>[\d.]+)\\times )?10\^\{(?P<power>-?\d+)\}\$"
    + r"|\$(?P<signed>[-+]?[\d.]+)\$|[^\\{}$&#%_^~]"
)


def printed(tex: str) -> str:
    """The text that TeX prints, read from left to right; an AssertionError at a special character by itself."""
    at, text = 0, ""
    while at < len(tex):
        token = TOKEN.match(tex, at)
        assert token is not None, tex[at:]
        power = f"{token['sign']}{token['factor'] or 1}e{token['power']}" if token["power"] else token["signed"]
        text += power or PRINTED.get(token[0], token[0])
        at = token.end()
    return text.replace("''", '"').replace("--", "–")


@given(st.text(st.sampled_from('ab 019.-+e\\{}$&#%_^~<>|"`[]()±→'), max_size=20))
def test_what_is_typed_is_what_is_printed(text: str) -> None:
    bare = " ".join(text.split())
    if "--" not in bare and "''" not in bare:  # a dash and a quote in TeX, and harmless
        assert printed(latex.escape(text)) == bare


def test_the_reader_of_tex_sees_what_is_not_escaped() -> None:
    for tex in ("50 % of", "a_b", r"\input{x}", "$x", "a & b"):
        with pytest.raises(AssertionError):
            printed(tex)


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("3e-3", r"$3\times 10^{-3}$"),
        ("1e4", "$10^{4}$"),
        ("-0.05 to 0.1", "$-0.05$ to 0.1"),
        ("2.43 ± 0.02", r"2.43 $\pm$ 0.02"),
        ("+0.2 [-1.4e-6, 0.3]", r"$+0.2$ [$-1.4\times 10^{-6}$, 0.3]"),
        ("tight_clip-2", r"tight\_clip-2"),  # a name, no number
        ("7 %", r"7 \%"),
    ],
)
def test_numbers_are_mathematics(text: str, tex: str) -> None:
    assert latex.escape(text) == tex


def structure(tex: str) -> list[tuple[int, ...]]:
    """Per tabular the fields of its specification and of each row; an AssertionError where environments are crossed."""
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", tex):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened and opened.pop() == name
    assert not opened
    assert tex.count("{") - tex.count(r"\{") == tex.count("}") - tex.count(r"\}")
    tables = re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n\\toprule\n(.*?)\\bottomrule", tex, re.DOTALL)
    rows = [[r for r in body.splitlines() if r != r"\midrule"] for _, body in tables]
    assert all(r.endswith(r" \\") for own in rows for r in own)
    counts = [[len(re.findall(r"(?<!\\)&", r)) + 1 for r in own] for own in rows]
    return [(len(spec), *own) for (spec, _), own in zip(tables, counts, strict=True)]


def page(*sections: Section) -> Any:
    """As much of a report as the file reads."""
    return SimpleNamespace(study="s", sections=sections)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Hostile names in a case and a dataset, and a trial that diverged."""
    path = planted.plant_study(tmp_path_factory.mktemp("latex") / "s", seeds=(0, 1, 2))
    planted.plant_trial(path, planted.settings(2, 1e-2, 0.2), case=r"a_b & {50%} \end{table} $x$")
    gone = planted.settings(6, 0.5, seed=0)
    planted.plant_trial(path, gone, steps_done=21, nonfinite_at=20, final_loss=math.nan, stop_reason="diverged")
    return Study.load(path)


def test_a_study_has_its_three_tables(study: Study) -> None:
    tex = latex.document(study, page())
    assert re.findall(r"\\label\{tab:(.*?)\}", tex) == ["cells", "verdicts", "effects"]
    tables = structure(tex)
    assert len(tables) == 3 and all(len(set(counts)) == 1 for counts in tables)
    assert [len(counts) - 2 for counts in tables[:2]] == [len(study.cells)] * 2
    assert r"a\_b \& \{50\%\} \textbackslash{}end\{table\} \$x\$ &" in tex
    cells = study.cells.reset_index()
    lines = [line for line in tex.splitlines() if line.startswith("-- & 2 & ")][: len(cells)]
    first = cells[(cells["model.depth"] == 2) & (cells["optim.lr"] == 1e-3)].iloc[0]
    assert lines[0].split(" & ")[2] == "$10^{-3}$"
    assert float(lines[0].split(" & ")[5].split(" ")[0]) == pytest.approx(first["final_loss_capped"], rel=5e-3)
    gone = next(line for line in tex.splitlines() if "& 0.5 &" in line and line.endswith(r"& 0 & 0 & 0 & 1 & 1 \\"))
    assert gone.startswith("-- & 6 & 0.5")


def test_an_open_environment_is_seen() -> None:
    with pytest.raises(AssertionError):
        structure(latex.latex(Table("t", ("a",), (("1",),))).replace(r"\end{tabular}", ""))


def test_a_row_that_begins_with_a_bracket_keeps_it() -> None:
    tex = latex.latex(Table("t", ("a", "b"), (("[0.1, 0.2]", "x"),)), "my label")
    assert "{}[0.1, 0.2] & x" in tex and r"\label{tab:my-label}" in tex


def test_a_comparison_has_its_differences_in_place_of_effects(study: Study, tmp_path: Path) -> None:
    other = Study.load(planted.plant_study(tmp_path / "other", depths=(2,), seeds=(0,), lrs=(1e-2,)))
    whole = Study.concat([study, other])
    differences = Table("Paired differences", ("studies", "change"), (("a → b", "-0.1"),), frozenset({"change"}))
    tex = latex.document(whole, page(Section(latex.DIFFERENCES, "Differences", [differences])))
    assert re.findall(r"\\label\{tab:(.*?)\}", tex) == ["cells", "verdicts", "differences-1"]
    assert all(len(set(counts)) == 1 for counts in structure(tex)) and r"a $\to$ b & $-0.1$" in tex
    assert f'Section("{latex.DIFFERENCES}"' in inspect.getsource(comparison_page)


def test_the_report_has_the_file(tmp_path: Path) -> None:
    planted.plant_frame(tmp_path / "s")
    planted.plant_trial(tmp_path / "s", planted.settings(2, 1e-2))
    one = Study.load(tmp_path / "s")
    content = study_page.report(one)
    publish.publish(one, content, tmp_path / "out")
    assert (tmp_path / "out" / "tables.tex").read_text() == latex.document(one, content)
    assert "tables.tex" in content.files
