"""The map of layers by steps: its field at a row and a step is the norm in the trace."""

from __future__ import annotations

import numpy as np
import pytest

from stabstudy.analysis.figures import style
from stabstudy.analysis.figures.layers import layer_map, peak_text, window
from stabstudy.trace import TRACE, Rows

SPIKE = {"start": 50, "end": 52, "peak_step": 51}


def rows(norms: np.ndarray) -> Rows:
    """A trace of steps 0, 1, ... whose layers have these norms, shape [steps, rows]."""
    columns = {"step": np.arange(len(norms)), "layer_grad_norm": norms}
    return Rows(TRACE, columns, {})


def norms(steps: int = 100, layers: int = 4) -> np.ndarray:
    """1 everywhere but: head 5; layer 1 (row 2) 40 at step 51."""
    made = np.ones((steps, layers + 2))
    made[:, -1] = 5.0
    made[51, 2] = 40.0
    return made


def test_fields_are_the_norms_of_the_trace() -> None:
    ax = layer_map(rows(norms()), SPIKE)
    (image,) = ax.images
    shown, (left, right, bottom, top) = image.get_array(), image.get_extent()
    assert (left, right, bottom, top) == (29.5, 72.5, -0.5, 5.5)  # 20 steps before 50, 20 after 52
    assert shown[2, 51 - 30] == 40 and shown[5, 0] == 5 and (shown == 1).sum() == shown.size - 43 - 1
    assert [t.get_text() for t in ax.get_yticklabels()] == ["embed", "layer 0", "layer 1", "layer 2", "layer 3", "head"]
    assert [line.get_xdata()[0] for line in ax.lines[:2]] == [49.5, 52.5]
    assert (image.norm.vmin, image.norm.vmax) == (1, 40)


def test_what_is_not_finite_is_empty() -> None:
    made = norms()
    made[51, 3], made[52, :] = np.inf, np.nan
    ax = layer_map(rows(made), SPIKE)
    shown = ax.images[0].get_array()
    assert shown.mask[3, 21] and shown.mask[:, 22].all() and shown.mask.sum() == 1 + 6
    assert peak_text(rows(made), SPIKE) == "At step 51 the norm of 1 of 6 rows was not finite."


@pytest.mark.parametrize("layers", [4, 0])
def test_a_record_without_layers_is_refused(layers: int) -> None:
    with pytest.raises(ValueError, match="no gradient norm of a layer around step 51"):
        layer_map(rows(np.full((100, layers), np.nan)), SPIKE)


def test_the_peak_in_words() -> None:
    assert peak_text(rows(norms()), SPIKE) == (
        "At step 51 the largest norm was that of layer 1 (40); layer 1 grew most, to 40 times its median over the "
        "steps before."
    )
    made = norms()
    made[51, -1], made[51, 2] = 50.0, 30.0
    text = peak_text(rows(made), SPIKE)
    assert "largest norm was that of head (50); layer 1 grew most, to 30 times" in text
    first = {"start": 0, "end": 0, "peak_step": 0}
    assert peak_text(rows(norms()), first) == "At step 0 the largest norm was that of head (5)."


@pytest.mark.parametrize(
    ("spike", "first", "last"),
    [({"start": 5, "end": 5, "peak_step": 5}, 0, 25), ({"start": 95, "end": 99, "peak_step": 96}, 75, 99),
     ({"start": 100, "end": 900, "peak_step": 400}, 320, 480)],
)  # fmt: skip
def test_the_window_ends_with_the_trace_and_is_bounded(spike: dict[str, int], first: int, last: int) -> None:
    found = window(rows(norms(1000 if last == 480 else 100)), spike)
    assert (found[0], found[-1]) == (first, last)


def test_of_many_layers_every_other_is_named_and_the_ends_are() -> None:
    ax = layer_map(rows(norms(layers=32)), SPIKE)
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names[0] == "embed" and names[-1] == "head" and len(names) <= 16 and names[1:3] == ["layer 0", "layer 3"]


def test_the_same_map_gives_the_same_bytes() -> None:
    first, second = (layer_map(rows(norms()), SPIKE).get_figure() for _ in range(2))
    assert style.to_svg(first) == style.to_svg(second)  # type: ignore[arg-type]
    assert style.to_png(first) == style.to_png(second)  # type: ignore[arg-type]
