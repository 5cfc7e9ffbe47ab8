"""The edge of the next size: laws by hand, statsmodels' prediction interval as reference, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm

from stabstudy.analysis.forecast import forecast
from stabstudy.analysis.frontier import Edge


def edge(value: float, factor: float = 1.1, status: str = "resolved") -> Edge:
    high = math.inf if status == "beyond" else value * factor
    return Edge(value, value / factor, high, 10, status, 0.05)


def test_a_power_law_goes_on() -> None:
    law = forecast({d: edge(0.4 / d, 1.01) for d in (2, 4, 8)}, 16)
    assert law.estimate == pytest.approx(0.025) and law.exponent == pytest.approx(-1)
    assert law.held_out == pytest.approx(0) and (law.sizes, law.reason) == (3, None)
    assert law.low is not None and law.high is not None and law.low < 0.025 < law.high


def test_edges_on_a_line_prove_no_precision() -> None:
    """The interval is at least that of the edges' own, here by hand: t(1) = 6.314, leverage 1 + 1/3 + 4/2."""
    law = forecast({d: edge(0.4 / d, 1.1) for d in (2, 4, 8)}, 16)
    half = 6.314 * math.log10(1.1) / 1.645 * math.sqrt(10 / 3)
    assert law.low == pytest.approx(0.025 * 10**-half, rel=1e-3)
    assert law.high == pytest.approx(0.025 * 10**half, rel=1e-3)


def test_the_largest_size_is_held_out() -> None:
    values = {2: 0.4, 4: 0.2, 8: 0.2}  # from 2 and 4 alone 8 is expected at 0.1
    assert forecast({d: edge(v) for d, v in values.items()}, 16).held_out == pytest.approx(math.log10(2))


def test_it_is_that_of_least_squares() -> None:
    sizes, values = [2, 4, 6, 10, 16], [0.31, 0.22, 0.08, 0.09, 0.03]
    fit = sm.OLS(np.log10(values), sm.add_constant(np.log10(sizes))).fit()
    reference = fit.get_prediction([[1, math.log10(32)]]).summary_frame(alpha=0.1)
    law = forecast({d: edge(v, 1.001) for d, v in zip(sizes, values, strict=True)}, 32)
    for own, name in ((law.estimate, "mean"), (law.low, "obs_ci_lower"), (law.high, "obs_ci_upper")):
        assert own is not None and math.log10(own) == pytest.approx(reference[name].iloc[0])


@pytest.mark.parametrize(
    "edges", [{}, {2: edge(0.1), 4: edge(0.1)}, {2: edge(0.1), 4: edge(0.1), 8: edge(1.0, status="beyond")}]
)
def test_fewer_than_three_edges_foretell_nothing(edges: dict[float, Edge]) -> None:
    law = forecast(edges, 16)
    assert law.reason == f"needs 3 sizes with an edge in the range, got {min(len(edges), 2)}"
    assert law.estimate is law.low is law.high is law.exponent is law.held_out is None


@pytest.mark.parametrize(("scatter", "most"), [(0.0, 1.0), (0.1, 0.97)])
def test_the_interval_covers_what_it_says(scatter: float, most: float) -> None:
    """Edges measured with an error that their intervals state, the true ones scattered about the law or not.

    Without scatter it covers all: so few sizes cannot exclude that there is some.
    """
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(500):
        true = {d: -1 - 0.6 * math.log10(d) + rng.normal(0, scatter) for d in (2, 4, 8, 16, 32)}
        measured = {d: edge(10 ** (x + rng.normal(0, 0.03)), 10 ** (0.03 * 1.645)) for d, x in true.items()}
        law = forecast({d: e for d, e in measured.items() if d < 32}, 32)
        assert law.low is not None and law.high is not None
        covered.append(law.low <= 10 ** true[32] <= law.high)
    assert 0.87 <= np.mean(covered) <= most
