"""Trials grouped into packs: each in one, of one shape, of even size, in order; what --dry-run says; what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabstudy import config as cfg
from stabstudy import shape, sweep
from stabstudy.planning import compute, estimate
from stabstudy.planning.compute import Compute
from stabstudy.planning.trials import Pack, PlannedTrial, most_per_pack, packs, packs_in_words

Gpus = Callable[..., None]


def trials(depths: list[int], rates: int, seeds: int) -> list[PlannedTrial]:
    """As `planned` orders them: seed by seed."""
    made = []
    for seed, depth, rate in itertools.product(range(seeds), depths, range(rates)):
        config = cfg.from_dict({"model": {"depth": depth}, "optim": {"lr": 1e-3 * (1 + rate)}, "seed": seed})
        ids = cfg.trial_id(config, "text"), cfg.cell_id(config, "text")
        made.append(PlannedTrial(*ids, config, {}, None, "text"))
    return made


def sizes(packed: list[Pack]) -> list[int]:
    return [len(pack) for pack in packed]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Make this machine one of that many GPUs, each with room for so many default trials in one process."""

    def have(count: int, members: float) -> None:
        config = cfg.TrialConfig()
        each = estimate.memory(config) + estimate.checkpoint_bytes(config)
        room = members * each + estimate.PROCESS_BYTES + 1
        monkeypatch.setattr(compute, "gpu_memory", lambda: (int(room),) * count)
        monkeypatch.setattr(compute, "cores", lambda: 64)

    return have


GPU = Compute(gpus_per_pack=1.0)


@given(
    depths=st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True),
    rates=st.integers(1, 7),
    seeds=st.integers(1, 4),
    pack=st.integers(1, 128),
    slots=st.integers(1, 9),
    automatic=st.booleans(),
)
def test_every_trial_is_in_one_pack_and_every_rule_holds(
    depths: list[int], rates: int, seeds: int, pack: int, slots: int, automatic: bool
) -> None:
    every = trials(depths, rates, seeds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "gpu_memory", lambda: (80 * 10**9,) * slots)
        patch.setattr(compute, "cores", lambda: 64)
        patch.setattr("stabstudy.planning.trials.MOST", pack)
        resources = Compute(gpus_per_pack=1.0, pack="auto" if automatic else pack)
        packed = packs(every, resources, "ray")
    assert sorted(t.trial_id for p in packed for t in p) == sorted(t.trial_id for t in every)
    assert max(sizes(packed)) <= pack
    for one in packed:
        assert all(shape.shape(t.config) == shape.shape(one[0].config) for t in one)
    of_depth = [[len(p) for p in packed if p[0].config.model.depth == depth] for depth in depths]
    assert all(max(s) - min(s) <= 1 for s in of_depth)
    if not automatic:
        assert all(len(s) == -(-rates * seeds // pack) for s in of_depth), "no more packs than needed"
    elif len(packed) < len(every):
        assert len(packed) % slots == 0, "no slot idles while others have a pack more"
    order = {t.trial_id: i for i, t in enumerate(every)}
    assert all([order[t.trial_id] for t in p] == sorted(order[t.trial_id] for t in p) for p in packed)
    firsts = [order[p[0].trial_id] for p in packed]
    assert firsts == sorted(firsts)


def test_packs_of_a_shape_are_even(gpus: Gpus) -> None:
    gpus(1, members=20.5)
    assert sizes(packs(trials([4], 12, 3), GPU, "ray")) == [18, 18]
    gpus(4, members=500)
    assert sizes(packs(trials([4], 12, 3), GPU, "ray")) == [9, 9, 9, 9]


def test_a_pack_never_holds_more_than_128(gpus: Gpus) -> None:
    gpus(1, members=10_000)
    assert sizes(packs(trials([4], 129, 1), GPU, "ray")) == [64, 65]


def test_seeds_of_a_cell_stay_together(gpus: Gpus) -> None:
    gpus(4, members=500)
    for pack in packs(trials([4], 12, 3), GPU, "ray"):
        cells = [t.cell_id for t in pack]
        assert all(cells.count(cell) == 3 for cell in cells)


def test_packs_of_one_keep_the_order_of_the_trials(gpus: Gpus) -> None:
    """Seed by seed, so that a study stopped half-way has every cell once before any cell twice."""
    every = trials([2, 4], 3, 3)
    assert [p[0] for p in packs(every, Compute(), "ray")] == every


def test_the_share_of_a_gpu_limits_a_pack(gpus: Gpus) -> None:
    gpus(1, members=80)
    config = cfg.TrialConfig()
    whole, quarter = (most_per_pack(config, Compute(gpus_per_pack=share)) for share in (1.0, 0.25))
    assert whole == 80 and 0 < quarter < 20
    gpus(1, members=0.1)
    assert most_per_pack(config, GPU) == 1, "what cannot fit is refused elsewhere, or forced"


def test_an_own_number_is_taken_as_it_is(gpus: Gpus) -> None:
    gpus(4, members=3)
    packed = packs(trials([4], 12, 1), Compute(gpus_per_pack=1.0, pack=6), "ray")
    assert sizes(packed) == [6, 6]
    (warning,) = estimate.crowded([[t.config for t in pack] for pack in packed], GPU, "ray")
    assert warning.startswith("compute.pack: ") and "halved" in warning
    assert sizes(packs(trials([4], 12, 1), Compute(pack=6), "ray")) == [6, 6], "on a CPU too"


def test_a_cluster_of_unknown_gpus_is_taken_for_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "gpu_memory", lambda: ())
    big = cfg.from_dict({"model": {"dim": 1024, "depth": 8, "n_heads": 16}, "data": {"seq_len": 256}})
    resources = Compute(gpus_per_pack=1.0, address="auto")
    assert (
        most_per_pack(big, resources)
        == int((16e9 - estimate.PROCESS_BYTES) / (estimate.memory(big) + estimate.checkpoint_bytes(big)))
        > 1
    )


def test_in_words() -> None:
    packed = packs(trials([2, 4, 6], 4, 3), Compute(pack=12), "ray")
    split = "a pack holds trials of one shape, these differ in model.depth"
    assert packs_in_words(packed) == f"36 trials in 3 packs of 12: {split}"
    assert packs_in_words(packs(trials([4], 5, 1), Compute(pack=3), "ray")) == "5 trials in 2 packs of 2 or 3"
    assert packs_in_words(packs(trials([4], 5, 1), Compute(pack=8), "ray")) == "5 trials in 1 pack of 5"


DRY = ["--dry-run", "sweep=quickstart"]


def test_dry_run_tells_packs_and_is_quiet_about_lone_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compute, "gpu_memory", lambda: ())
    assert sweep.main([*DRY]) == 0
    assert " pack" not in capsys.readouterr().out
    assert sweep.main([*DRY, "compute.pack=12"]) == 0
    assert "36 trials in 4 packs of 9: a pack holds trials of one shape, these differ in model.depth" in (
        capsys.readouterr().out
    )
    monkeypatch.setattr(compute, "gpu_memory", lambda: (80 * 10**9,))
    assert sweep.main([*DRY, "compute=gpu", "compute.pack=1"]) == 0
    assert "36 trials in 36 packs of 1" in capsys.readouterr().out


TABLE = [
    ((4, 64, 32, 8), {1: 0.57, 8: 0.099, 32: 0.037, 128: 0.019}),
    ((6, 128, 256, 8), {1: 1.40, 8: 0.32, 32: 0.21, 128: 0.18}),
    ((6, 256, 256, 16), {1: 1.98, 8: 0.87, 32: 0.76}),
    ((8, 512, 512, 16), {1: 6.28, 8: 5.09, 16: 5.0}),
]
"""Layers, width, sequence, batch; milliseconds for a step of one trial by trials in the pack, measured on an H200."""


@pytest.mark.parametrize(("sizes_", "measured"), TABLE, ids=lambda v: str(v[:2]) if isinstance(v, tuple) else "")
def test_the_rule_of_thumb_meets_what_was_measured(
    gpus: Gpus, sizes_: tuple[int, int, int, int], measured: dict[int, float]
) -> None:
    gpus(1, members=1000)
    depth, dim, seq_len, batch = sizes_
    train: dict[str, Any] = {"steps": 10**6, "batch_size": batch, "eval_every": 10**6, "final_eval_tokens": 1}
    config = cfg.from_dict({"model": {"depth": depth, "dim": dim}, "data": {"seq_len": seq_len}, "train": train})
    for members, milliseconds in measured.items():
        seconds = estimate.cost([[config] * members], GPU, "ray", None).seconds - estimate.PACK_START_SECONDS
        assert seconds / members / 10**6 * 1e3 == pytest.approx(milliseconds, rel=1 / 3)


def test_cost_counts_packs(gpus: Gpus) -> None:
    gpus(2, members=1000)
    config = cfg.TrialConfig()
    one, packed = estimate.cost([[config]] * 8, GPU, "ray", None), estimate.cost([[config] * 4] * 2, GPU, "ray", None)
    assert (one.tokens, one.flops, one.slots) == (packed.tokens, packed.flops, packed.slots) and packed.slots == 2
    assert packed.seconds < one.seconds / 3 and packed.wall_seconds == pytest.approx(packed.seconds / 2)
    assert packed.disk - one.disk == pytest.approx(2 * (8 - 2) * estimate.checkpoint_bytes(config)), "8 run at once"
