"""Estimates and caveats of a launch, before it starts: tokens, arithmetic, time, disk, memory; what it cannot show.

A caveat is one line, a warning that stops nothing. Arithmetic is that of the decoder in `training/model.py`. Time comes
from finished trials of the same study where there are any, else from a rule of thumb that fits two measurements on one
core (Zen 4, fp32, one thread): 7.2 ms a step for 2 layers of width 32 and 256 tokens, 22.7 ms for 4 layers of width 64
and 512 tokens; and fourteen on a GPU (H200, loss compiled, the step one graph), of packs of 1 to 128 trials, 4 to 8
layers of width 64 to 512, each met within a third. Bytes are those of the trace's format at the widths measured (208
bytes a row at 14 layer groups).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from stabstudy import store, trace, wording
from stabstudy.config import OPTIMIZERS, DataConfig, TrialConfig
from stabstudy.data.batches import Supply
from stabstudy.disk import trial_obstacle
from stabstudy.planning import compute
from stabstudy.planning.compute import Compute
from stabstudy.settings import Problem
from stabstudy.stability.rules import FEW_TOKENS, Rules

APART = 1.1  # ratio of epochs from which texts of a data axis count as unequally repeated

BYTE_VOCABULARY = 258
ASSUMED_VOCABULARY = 65_536
"""Rows of the embedding where only loading the tokenizer would tell."""

CORE_FLOPS = 44e9  # a CPU core on small matrices, fp32
GPU_FLOPS_PER_WIDTH = 6e11  # of one recent GPU on matrices of that width ...
GPU_FLOPS = 4.5e14  # ... and at most
STEP_SECONDS = 0.006  # what a step on a core costs beside its arithmetic
LAYER_SECONDS = 0.00017  # the same of a pack's step on a GPU, for each layer
START_SECONDS = 3.0  # of a trial: its model, its data, its files
PACK_START_SECONDS = 25.0  # of a pack on a GPU: compiling, measuring the first weights, capturing the step
BYTES_PER_PARAMETER = 12  # fp32 weight, gradient, one temporary; what the optimizer remembers comes on top
ACTIVATION_BYTES = 84  # per token, layer and unit of width
SCORE_BYTES = 16  # per attention score where they are kept: capped, its tanh, weights, mask
PROCESS_BYTES = 0.7e9  # a process with torch in it


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


STEPS_TO_JUDGE = Rules().fill + Rules().min_evaluable
"""Steps below which no trial gets a verdict."""


def _short(configs: Sequence[TrialConfig]) -> Iterator[str]:
    rules = Rules()
    short = sum(c.train.steps < STEPS_TO_JUDGE for c in configs)
    if short:
        yield (
            f"train.steps: {short} of {wording.count(len(configs), 'trial', ',')} will get no verdict: it needs "
            f"{rules.min_evaluable} evaluable steps after the first {rules.fill}, "
            f"so train.steps must be at least {STEPS_TO_JUDGE}"
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
    unit = "tokens" if all(c.objective.kind == "lm" for c in configs) else "positions (only completions are targets)"
    trials = wording.count(len(configs), "trial", ",")
    if few:
        yield (
            f"train.batch_size, data.seq_len: {min(few)} {unit} a step in {len(few)} of {trials}: under {FEW_TOKENS} "
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


@dataclass(frozen=True)
class Cost:
    """Of packs: tokens, floating-point operations, seconds one after another and on the slots there are, bytes."""

    tokens: int
    flops: float
    seconds: float
    wall_seconds: float | None  # null: on a cluster whose size is not known here
    slots: int | None
    disk: float
    measured: bool  # seconds from finished trials of this study


def vocabulary(config: TrialConfig) -> int:
    """Rows of the embedding, as far as they are known without loading a tokenizer."""
    return BYTE_VOCABULARY if config.data.tokenizer == "bytes" else ASSUMED_VOCABULARY


def flops(config: TrialConfig) -> float:
    """Forward and backward of all steps: 6 per weight and token, plus 6 * width * tokens seen, per layer (causal).

    Of objective `kto` twice that: three forward passes more, at 2 each.
    """
    m, passes = config.model, 2 if config.objective.kind == "kto" else 1
    weights = m.parameters(vocabulary(config)) - (0 if m.tied else vocabulary(config) * m.dim)  # a lookup is free
    attention = 6 * m.depth * m.dim * config.data.seq_len
    return float(config.tokens) * (6 * weights + attention) * passes


def memory(config: TrialConfig) -> float:
    """Bytes that a trial needs at its peak: weights and their moments, activations of one micro-batch, logits."""
    m, tokens = config.model, config.train.micro_batch * config.data.seq_len
    activations = tokens * m.dim * m.depth * ACTIVATION_BYTES
    if m.attn_softcap is not None:  # explicit scores, some of them kept for the backward pass
        activations += tokens * config.data.seq_len * m.n_heads * m.depth * SCORE_BYTES
    each = BYTES_PER_PARAMETER + 4 * OPTIMIZERS[config.optim.kind] + 4 * (config.objective.kind == "kto")  # reference
    return m.parameters(vocabulary(config)) * each + activations + 12.0 * tokens * vocabulary(config)


def disk(config: TrialConfig, keep_checkpoints: bool) -> float:
    """Bytes that a finished trial leaves behind."""
    columns = len(trace.KTO) if config.objective.kind == "kto" else 0
    record = config.train.steps * (96 + 8 * (config.model.depth + 2 + columns))
    probes = config.train.steps / config.train.probe_every * 400
    weights = 4.0 * config.model.parameters(vocabulary(config))
    kept = 2 * checkpoint_bytes(config) + weights if keep_checkpoints else 0
    return record + probes + kept + 10_000


def checkpoint_bytes(config: TrialConfig) -> float:
    """Weights and what the optimizer remembers of each, in fp32."""
    return 4.0 * (1 + OPTIMIZERS[config.optim.kind]) * config.model.parameters(vocabulary(config))


def cost(packs: Sequence[Sequence[TrialConfig]], resources: Compute, launcher: str, rate: float | None) -> Cost:
    """Of training these packs. `rate`: operations per second measured in this study, or None."""
    configs = [config for pack in packs for config in pack]
    each = [_seconds(pack, resources, rate) for pack in packs]
    seconds, count = sum(each), slots(resources, launcher)
    wall = max(max(each), seconds / min(count, len(packs))) if count is not None and packs else None
    running = sorted((sum(map(checkpoint_bytes, pack)) for pack in packs), reverse=True)[: count or 1]
    return Cost(
        tokens=sum(config.tokens for config in configs),
        flops=sum(flops(config) for config in configs),
        seconds=seconds,
        wall_seconds=wall,
        slots=count,
        disk=sum(disk(config, resources.keep_checkpoints) for config in configs) + 2 * sum(running),
        measured=rate is not None,
    )


def slots(resources: Compute, launcher: str) -> int | None:
    """Packs that run at once on this machine; None on a cluster."""
    if launcher == "local":
        return 1
    if resources.address is not None:
        return resources.max_concurrent
    fit = compute.cores() // resources.cpus_per_pack
    if resources.gpus_per_pack:
        fit = min(fit, math.floor(len(compute.gpu_memory()) / resources.gpus_per_pack + 1e-9))
    return max(1, min(fit, resources.max_concurrent or fit))


def measured_rate(study: store.StudyFolder, limit: int = 16) -> float | None:
    """Operations per second of up to `limit` finished trials of the study, from their traces; None without any."""
    operations = spent = 0.0
    finished = [f for f in study.trials() if f.finished(trace.TRACE).exists() and not trial_obstacle(f.path, True)]
    for folder in finished[:limit]:
        try:
            rows = folder.rows(trace.TRACE, verify=False)
            config, _ = folder.read_own()
            packed = _packed(folder)
        except (store.StoreError, trace.DamagedRecord, OSError):
            continue
        if rows is not None and len(rows):
            spent += float(rows["seconds"].sum()) / packed
            operations += flops(config) * len(rows) / config.train.steps
    return operations / spent if spent > 0 else None


def _packed(folder: store.TrialFolder) -> int:
    """Trials that shared the steps of the trial's last attempt, as its engine tells."""
    attempts = folder.read_state().attempts
    return int(attempts[-1].engine.get("pack", 1)) if attempts else 1


def room(resources: Compute) -> float | None:
    """Bytes that one pack may fill: its share of a GPU, else all of this machine; None where it is not known here."""
    if resources.address is not None:
        return None
    if resources.gpus_per_pack:
        return max(compute.gpu_memory(), default=0) * resources.gpus_per_pack or None
    return compute.memory() - PROCESS_BYTES


def too_large(configs: Sequence[TrialConfig], resources: Compute) -> list[Problem]:
    """A problem where the largest trial cannot fit where it would run."""
    there = room(resources)
    largest = max(configs, key=memory)
    if there is None or memory(largest) <= there:
        return []
    rule = f"a trial must fit into the {there / 1e9:.0f} GB there are (force=true launches it anyway)"
    parameters = largest.model.parameters(vocabulary(largest))
    got = f"about {memory(largest) / 1e9:,.0f} GB for {parameters:,} parameters"
    return [Problem("model.depth, model.dim, train.batch_size", rule, got)]


def crowded(packs: Sequence[Sequence[TrialConfig]], resources: Compute, launcher: str) -> list[str]:
    """Warnings where a pack fills more than its GPU, or packs fit one by one but not as many as would run at once."""
    largest, there = max(sum(map(memory, pack)) for pack in packs), room(resources)
    if resources.gpus_per_pack:
        if there is None or largest + PROCESS_BYTES <= there:
            return []
        got = f"{largest / 1e9:.0f} GB are needed, {there / 1e9:.0f} GB are there"
        return [f"compute.pack: {got}; packs are halved until they fit (auto counts what fits)"]
    at_once, each = slots(resources, launcher), largest + PROCESS_BYTES
    fit = max(1, int(compute.memory() / each))
    if at_once is None or min(at_once, len(packs)) <= fit:
        return []
    return [f"compute.max_concurrent: {at_once} packs at once need {at_once * each / 1e9:.0f} GB; {fit} fit"]


def _seconds(pack: Sequence[TrialConfig], resources: Compute, rate: float | None) -> float:
    """Of one pack, whose members share what a step costs beside its arithmetic on a GPU, and nothing on a core."""
    start = PACK_START_SECONDS if resources.gpus_per_pack else START_SECONDS * len(pack)
    arithmetic = sum(_steps(c) * flops(c) / c.train.steps for c in pack)
    if rate:
        return start + arithmetic / rate
    if resources.gpus_per_pack:
        speed = min(GPU_FLOPS, GPU_FLOPS_PER_WIDTH * pack[0].model.dim) * resources.gpus_per_pack
        return start + max(map(_steps, pack)) * LAYER_SECONDS * pack[0].model.depth + arithmetic / speed
    return start + STEP_SECONDS * sum(map(_steps, pack)) + arithmetic / (CORE_FLOPS * resources.threads)


def _steps(config: TrialConfig) -> float:
    """Training steps that a trial takes as long as. The evaluations cost a third of a training step per token."""
    t = config.train
    sequences = (2 + t.steps // t.eval_every) * t.eval_sequences + 2 * config.final_eval_sequences
    return t.steps + sequences / t.batch_size / 3
