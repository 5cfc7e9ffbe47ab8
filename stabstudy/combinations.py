"""Rules between settings: combinations that cannot train, and settings that would have no effect.

A setting without effect would split one recipe into several cells that train alike, so it is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stabstudy.groups import MOST_DECAY, OF_FAMILY, SPIKE_SKIP_FROM, DataConfig, ModelConfig, OptimConfig
from stabstudy.settings import Problem

if TYPE_CHECKING:
    from stabstudy.config import TrialConfig


def problems(config: TrialConfig) -> Iterator[Problem]:
    """Rules that hold between settings; each names every setting it needs."""
    m, o, d, t = config.model, config.optim, config.data, config.train
    if m.dim % m.n_heads:
        yield Problem("model.dim, model.n_heads", "dim must be divisible by n_heads", f"{m.dim} and {m.n_heads}")
    elif m.head_dim % 2:
        yield Problem("model.dim, model.n_heads", "dim / n_heads must be even (RoPE rotates pairs)", f"{m.head_dim}")
    if m.n_heads % m.kv_heads:
        yield Problem(
            "model.n_heads, model.n_kv_heads",
            "n_heads must be divisible by n_kv_heads",
            f"{m.n_heads} and {m.kv_heads}",
        )
    if m.residual_scale == "deepnorm" and m.norm_placement != "post":
        yield Problem(
            "model.residual_scale, model.norm_placement",
            "deepnorm needs norm_placement post (without it the residual stream grows as (2*depth)^(depth/2))",
            f"norm_placement {m.norm_placement}",
        )
    if m.residual_scale == "inverse_depth" and m.depth == 1:
        yield Problem("model.residual_scale, model.depth", "inverse_depth has no effect at depth 1", "depth 1")
    if (o.warmup_steps is None) == (o.warmup_share is None):
        got = "null and null" if o.warmup_steps is None else f"{o.warmup_steps} and {o.warmup_share:g}"
        yield Problem("optim.warmup_steps, optim.warmup_share", "set one of them; the other must be null", got)
    elif config.warmup_steps > t.steps:
        yield Problem(
            "optim.warmup_steps, train.steps", "the warmup must end within the run", f"{o.warmup_steps} and {t.steps}"
        )
    if t.batch_size % t.micro_batch:
        yield Problem(
            "train.batch_size, train.micro_batch_size",
            "batch_size must be divisible by micro_batch_size",
            f"{t.batch_size} and {t.micro_batch}",
        )
    if o.lr == 0 and not o.allow_zero_lr:
        yield Problem(
            "optim.lr",
            "must be a finite number in (0, 10] (0 only with optim.allow_zero_lr=true: a control trial)",
            "0",
        )
    if o.lr > 0 and o.allow_zero_lr:
        yield Problem("optim.allow_zero_lr", "has no effect unless optim.lr is 0", "true")
    if o.lr == 0 and o.decay_mode == "independent":
        yield Problem("optim.decay_mode", "independent decay needs optim.lr > 0 (it follows lr_t / lr)", "optim.lr 0")
    elif o.decay_mode == "independent" and config.decay_per_step > MOST_DECAY:
        yield Problem(
            "optim.weight_decay, optim.decay_mode",
            "independent decay removes this share of every weight in each step, without the factor lr: must be at most "
            f"{MOST_DECAY:g} (as strong as {o.weight_decay:g} coupled: {o.weight_decay * config.peak_matrix_lr:.3g})",
            f"{o.weight_decay:g}, {100 * config.decay_per_step:.3g} % per step",
        )
    if o.lr == 0 and o.muon_lr is not None:
        yield Problem("optim.muon_lr", "must be null where optim.lr is 0 (a control trial)", f"{o.muon_lr:g}")
    yield from _not_of_family(m)
    yield from _no_effect(o, d, config)


def _not_of_family(m: ModelConfig) -> Iterator[Problem]:
    """Settings that a Hugging Face family fixes, and those that it does not have."""
    if m.family == "lingua":
        return
    for name, value in OF_FAMILY[m.family].items():
        if (got := getattr(m, name)) != value:
            said = str(value).lower() if isinstance(value, bool) else value
            how = f"set model.{name}={said}, in a zip where families differ, or use the preset model={m.family}"
            yield Problem(f"model.{name}", f"must be {said} with family {m.family} ({how})", str(got).lower())
    if m.attn_softcap is not None:
        yield Problem(
            "model.attn_softcap", "has an effect with family lingua only (sdpa has no cap)", f"family {m.family}"
        )
    if m.embed_scale != ModelConfig.embed_scale:
        own = ", which multiplies by sqrt(dim) itself" if m.family == "gemma3" else ""
        yield Problem("model.embed_scale", "has an effect with family lingua only", f"family {m.family}{own}")
    if m.residual_scale != ModelConfig.residual_scale:
        yield Problem("model.residual_scale", "has an effect with family lingua only", f"family {m.family}")


def _no_effect(o: OptimConfig, d: DataConfig, config: TrialConfig) -> Iterator[Problem]:
    """A setting that changes nothing would split one recipe into several cells: refuse it by name."""
    for name in ("muon_lr", "muon_momentum", "muon_adjust_lr"):
        if o.kind != "muon" and getattr(o, name) != getattr(OptimConfig, name):
            yield Problem(f"optim.{name}", "has an effect with kind muon only", f"kind {o.kind}")
    if o.kind == "lion" and o.eps != OptimConfig.eps:
        yield Problem("optim.eps", "has no effect with kind lion", f"{o.eps:g}")
    if o.schedule != "wsd" and o.decay_share != OptimConfig.decay_share:
        yield Problem("optim.decay_share", "has an effect with schedule wsd only", f"schedule {o.schedule}")
    if o.schedule != "wsd" and o.decay_shape != OptimConfig.decay_shape:
        yield Problem("optim.decay_shape", "has an effect with schedule wsd only", f"schedule {o.schedule}")
    if o.schedule == "inv_sqrt" and config.warmup_steps == 0:
        yield Problem(
            "optim.schedule, optim.warmup_steps", "inv_sqrt scales by the warmup: needs warmup_steps >= 1", "0"
        )
    if o.lr_rule != "none" and o.base_batch is None:
        yield Problem(
            "optim.lr_rule, optim.base_batch", f"{o.lr_rule} needs the base_batch that lr is meant for", "null"
        )
    if o.lr_rule == "none" and o.base_batch is not None:
        yield Problem("optim.base_batch", "has an effect with optim.lr_rule only", f"{o.base_batch} and lr_rule none")
    if o.clip is None and o.clip_kind != OptimConfig.clip_kind:
        yield Problem("optim.clip_kind", "has an effect only where optim.clip is on", f"{o.clip_kind} and clip null")
    if o.clip_kind == "agc" and o.clip not in (None, OptimConfig.clip):
        rule = f"clip_kind agc has bounds of its own: must be {OptimConfig.clip:g} (on) or null (off)"
        yield Problem("optim.clip", rule, f"{o.clip:g}")
    if config.train.skip_spikes and config.train.steps <= SPIKE_SKIP_FROM:
        rule = f"skips nothing in the first {SPIKE_SKIP_FROM} steps: train.steps must be larger"
        yield Problem("train.skip_spikes, train.steps", rule, str(config.train.steps))
    needs_path = d.source not in ("pysrc", "synthetic")
    if needs_path and not d.path:
        yield Problem("data.path", f"source {d.source} needs a path", "null")
    if not needs_path and d.path is not None:
        yield Problem("data.path", f"has no effect with source {d.source}", repr(d.path))
    if d.files is not None:
        if d.source not in ("text", "jsonl", "parquet"):
            yield Problem("data.files", "has an effect with sources text, jsonl, parquet only", f"source {d.source}")
        elif not d.files or d.files.startswith(("/", "~")) or ".." in d.files.split("/"):
            yield Problem("data.files", "must be a glob below data.path, such as *.md or **/*.rst", repr(d.files))
    for field in dataclasses.fields(DataConfig):
        owner = "synthetic" if field.name.startswith("synth_") else "hf" if field.name.startswith("hub_") else d.source
        if owner != d.source and getattr(d, field.name) != field.default:
            yield Problem(f"data.{field.name}", f"has an effect with source {owner} only", f"source {d.source}")
    if d.text_column != DataConfig.text_column and d.source not in ("jsonl", "parquet", "hf"):
        yield Problem("data.text_column", "has an effect with sources jsonl, parquet, hf only", f"source {d.source}")
    if d.bad_rows and d.source in ("pysrc", "synthetic", "text"):
        yield Problem("data.bad_rows", "has an effect with sources of rows only", f"source {d.source}")
    if d.synth_order == 0 and d.synth_branching != DataConfig.synth_branching:
        yield Problem("data.synth_branching", "has an effect with synth_order >= 1 only", str(d.synth_branching))
