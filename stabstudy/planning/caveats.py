"""Caveats of a launch: what its trials will not be able to show, known before they start.

Each is one line, a warning that stops nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stabstudy import wording
from stabstudy.config import DataConfig, TrialConfig
from stabstudy.data.batches import Supply
from stabstudy.stability.rules import Rules

FEW_TOKENS = 128  # a step; measured: at 32, calm recipes are rough by their batches alone, at 128 none was
APART = 1.1  # ratio of epochs from which texts of a data axis count as unequally repeated


@dataclass(frozen=True)
class Epochs:
    """How often a trial reads its training part; not `exact`: at least so often."""

    number: float
    exact: bool

    def __str__(self) -> str:
        return f"{'' if self.exact else 'at least '}{self.number:.3g} epochs"


def caveats(
    configs: Sequence[TrialConfig], axes: Iterable[str], supplies: Mapping[DataConfig, Supply | None]
) -> Iterator[str]:
    """The lines for these trials. `axes`: names of what varies; `supplies`: training tokens, where known."""
    yield from _short(configs)
    yield from _unevaluated(configs)
    yield from _noisy(configs)
    yield from repetition(configs, axes, supplies)
    yield from _mixed_decay(configs)


def repetition(
    configs: Sequence[TrialConfig], axes: Iterable[str], supplies: Mapping[DataConfig, Supply | None]
) -> Iterator[str]:
    """Text that is read more than once, and axes over data whose texts are, to an unequal degree."""
    most: dict[str, Epochs] = {}  # by the name of a text
    for config in configs:
        supply = supplies.get(config.data)
        if supply is not None and supply.tokens > 0:
            name = _text(config.data)
            own = Epochs(config.tokens / supply.tokens, supply.exact)
            most[name] = max(most.get(name, own), own, key=lambda epochs: epochs.number)
    repeats = {name: epochs for name, epochs in most.items() if epochs.number > 1}
    for name, epochs in repeats.items():
        yield f"data: a trial trains {epochs} of {name}: repeated text changes losses and spikes"
    unknown = sorted({_text(config.data) for config in configs} - set(most))
    if repeats and len(most) + len(unknown) > 1 and any(axis.partition(".")[0] == "data" for axis in axes):
        ranks = sorted(most, key=lambda name: most[name].number)
        low, high = most[ranks[0]], most[ranks[-1]]
        if unknown or high.number > APART * low.number:
            others = f"an unknown number of {unknown[0]}" if unknown else f"{low} of {ranks[0]}"
            yield f"data: {high} of {ranks[-1]}, {others}: the axis compares repetition as well as text"


def timescales(configs: Sequence[TrialConfig]) -> str | None:
    """AdamW's timescale, 1/(lr*weight_decay) steps (arXiv 2405.13698), over the trials; None where none decays.

    The learning rate is the peak; with independent decay it is 1/weight_decay steps.
    """
    decays = [c for c in configs if c.decay_timescale is not None]
    steps = [t for c in decays if (t := c.decay_timescale) is not None]
    if not steps:
        return None
    runs = [count / c.train.steps for count, c in zip(steps, decays, strict=True)]
    formulas = {"1/weight_decay" if c.optim.decay_mode == "independent" else "1/(lr*weight_decay)" for c in decays}
    return (
        f"weight decay timescale {', '.join(sorted(formulas))}: {_range(min(steps), max(steps))} steps, "
        f"{_range(min(runs), max(runs))} times the run"
    )


def _short(configs: Sequence[TrialConfig]) -> Iterator[str]:
    rules = Rules()
    needed = rules.fill + rules.min_evaluable
    short = sum(c.train.steps < needed for c in configs)
    if short:
        yield (
            f"train.steps: {short} of {wording.count(len(configs), 'trial', ',')} will get no verdict: it needs "
            f"{rules.min_evaluable} evaluable steps after the first {rules.fill}, "
            f"so train.steps must be at least {needed}"
        )


def _unevaluated(configs: Sequence[TrialConfig]) -> Iterator[str]:
    beyond = [c for c in configs if c.train.eval_every > c.train.steps]
    if beyond:
        every, steps = beyond[0].train.eval_every, beyond[0].train.steps
        yield (
            f"train.eval_every: {every} is beyond train.steps={steps} in {len(beyond)} of "
            f"{wording.count(len(configs), 'trial', ',')}: no validation loss between the first and the last"
        )


def _noisy(configs: Sequence[TrialConfig]) -> Iterator[str]:
    few = [c.tokens_per_step for c in configs if c.tokens_per_step < FEW_TOKENS]
    trials = wording.count(len(configs), "trial", ",")
    if few:
        yield (
            f"train.batch_size, data.seq_len: {min(few)} tokens a step in {len(few)} of {trials}: under {FEW_TOKENS} "
            "a rough gradient norm may be sampling noise"
        )


def _mixed_decay(configs: Sequence[TrialConfig]) -> Iterator[str]:
    """Trials that differ in decay_mode alone differ 1/lr-fold in the strength of the decay as well."""
    modes: dict[TrialConfig, set[str]] = {}
    if len({c.optim.decay_mode for c in configs}) == 1:
        return
    for c in configs:
        if c.optim.weight_decay > 0 and c.peak_lr > 0:
            key = dataclasses.replace(c, optim=dataclasses.replace(c.optim, decay_mode="coupled"))
            modes.setdefault(key, set()).add(c.optim.decay_mode)
    mixed = [c for c, both in modes.items() if len(both) > 1]
    if mixed:
        fold = _range(min(1 / c.peak_lr for c in mixed), max(1 / c.peak_lr for c in mixed))
        lr, decay = mixed[0].peak_lr, mixed[0].optim.weight_decay
        yield (
            f"optim.decay_mode: at one weight_decay, independent decay is {fold} times (1/lr) as strong as coupled; "
            f"equally strong is lr times the coupled weight_decay, here {lr:.3g} * {decay:.3g} = {lr * decay:.3g}"
        )


def _text(data: DataConfig) -> str:
    """The name of a text: its path, or its source, and how much of it is read where the settings limit it."""
    name = " ".join(filter(None, (data.path, data.hub_config))) or data.source
    size = data.max_bytes or (data.synthetic.bytes if data.source == "synthetic" else None)
    return name if size is None else f"{name} ({wording.amount(size)}B)"


def _range(low: float, high: float) -> str:
    first, last = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in (low, high))
    return first if first == last else f"{first} to {last}"
