"""Tokens per second of this trainer, everything recorded, against what people would use instead, in one run.

    python benchmarks/throughput.py [--tiny] [--threads 1 2] [--shapes h d64 d256] [--rounds 5] [--lingua PATH]

Rivals: `lingua` (its own Transformer in a plain loop, from a checkout at PATH; three of its imports that a CPU lacks
are empty stubs here), `hf_trainer` (transformers.Trainer on LlamaForCausalLM, logging every step), `hf_loop` (a plain
loop on the same model). All train the same shape in float32 with fused AdamW and clipping at 1.0 on the same random
tokens. Ours runs the real loop: every trace column at every step, written to disk, probes every 10 steps. `bare` is our
model and update without any record: its losses must equal ours bit for bit, and its time is what recording costs.

Each rival has a process of its own. Segments take turns, so that a change of the machine's speed meets all of them;
figures are medians over the rounds. A segment whose process did not get its cores (CPU seconds per wall second below .9
a thread for one thread) is counted in `starved` and left out where others remain. `first_s` is the first segment,
compiling included where kernels were not on disk. One JSON line for each (shape, threads).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trainer
from torch import Tensor

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import clipping
from stabstudy.training.families import Model
from stabstudy.training.loop import Progress
from stabstudy.training.pack import keep_freed_memory
from stabstudy.training.schedule import schedule
from stabstudy.training.step import keep_compiled

VOCAB, CPU = 256, torch.device("cpu")
WARM = 1
"""Steps of a segment that are not timed."""


@dataclass(frozen=True)
class Shape:
    """Model, sequence length and sequences per step."""

    depth: int
    dim: int
    heads: int
    seq: int
    batch: int
    steps: int  # timed in a segment

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(depth=self.depth, dim=self.dim, n_heads=self.heads, multiple_of=256)

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    def flops_per_token(self) -> float:
        """6 for each parameter of a matrix, 12 * depth * dim * seq for attention (PaLM's count, causal not halved)."""
        matrices = self.model.parameters(VOCAB) - VOCAB * self.dim
        return 6 * matrices + 12 * self.depth * self.dim * self.seq


SHAPES = {"h": Shape(4, 128, 4, 256, 8, 10), "d64": Shape(6, 64, 4, 128, 8, 20), "d256": Shape(8, 256, 4, 256, 8, 4)}
TINY = {"tiny": Shape(2, 32, 2, 16, 2, 3)}
TINY_RIVALS = ("ours", "bare", "hf_loop")
"""No compiler, and nothing that takes seconds to set itself up."""


@dataclass(frozen=True)
class Taken:
    """One segment: seconds of its timed steps, and the losses of all its steps where the rival tells them."""

    wall: float
    cpu: float
    losses: tuple[float, ...] = ()


class Marks:
    """(wall, CPU) at the end of each step of a segment."""

    def __init__(self, shape: Shape) -> None:
        self.count = WARM + shape.steps
        self.at: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def clear(self) -> None:
        """Begin the next segment."""
        self.at, self.losses = [], []

    def mark(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    @property
    def full(self) -> bool:
        return len(self.at) == self.count

    def taken(self) -> Taken:
        (wall, cpu), (end_wall, end_cpu) = self.at[WARM - 1], self.at[-1]
        return Taken(end_wall - wall, end_cpu - cpu, tuple(self.losses))


Segment = Callable[[], Taken]


def trial(shape: Shape) -> TrialConfig:
    train = TrainConfig(steps=10**6, batch_size=shape.batch, eval_every=10**8, checkpoint_every=10**8)
    return TrialConfig(model=shape.model, optim=OptimConfig(lr=1e-3), data=DataConfig(seq_len=shape.seq), train=train)


def random_windows(shape: Shape) -> Any:
    """A supply of batches, [64, batch, seq + 1], for those that do not read ours."""
    return np.random.default_rng(0).integers(0, VOCAB, (64, shape.batch, shape.seq + 1))


def ours(shape: Shape, compiled: bool = False) -> Segment:
    """A pack of one trial, as the product runs it on a CPU."""
    keep_freed_memory()
    marks = Marks(shape)

    def heartbeat(progress: Sequence[Progress]) -> bool:
        marks.losses.append(progress[0].loss)
        marks.mark()
        return marks.full

    loop = trainer.loop_of([trial(shape)], VOCAB, CPU, Path(tempfile.mkdtemp()), heartbeat, compiled)

    def segment() -> Taken:
        marks.clear()
        loop.run()
        return marks.taken()

    return segment


def bare(shape: Shape) -> Segment:
    """The same model, clip and optimizer, and the loss of each step; no other number is computed or kept."""
    keep_freed_memory()
    config, marks = trial(shape), Marks(shape)
    stepper, batches = trainer.stepper_of([config], VOCAB, CPU), trainer.random_batches(config, VOCAB)
    factor, never, step = schedule(config.optim, config.train.steps), torch.zeros(1), 0

    def mean_loss(model: Model, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
        return {"loss": losses.sum() / shape.tokens}

    def segment() -> Taken:
        nonlocal step
        marks.clear()
        while not marks.full:
            windows = torch.from_numpy(batches.batch(step)[None])
            loss = stepper.stack.run(mean_loss, windows[..., :-1], windows[..., 1:])["loss"]
            grads = stepper.stack.gradients(loss.sum())
            norms = clipping.tensor_norms(grads)
            stepper.clip_rule.apply(grads, norms, clipping.global_norm(norms))
            stepper.optimizer.step(grads, [config.peak_lr * factor(step)], never)
            marks.losses.append(loss.item())
            marks.mark()
            step += 1
        return marks.taken()

    return segment


def plain_loop(shape: Shape, model: torch.nn.Module, loss_of: Callable[[Any, Any], Any]) -> Segment:
    """zero_grad, forward, backward, clip, step: the least that anybody writes; the norm is computed and dropped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = random_windows(shape)

    def segment() -> Taken:
        marks = Marks(shape)
        for step in range(marks.count):
            windows = torch.from_numpy(batches[step % len(batches)])
            optimizer.zero_grad()
            loss_of(windows[:, :-1], windows[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            marks.mark()
        return marks.taken()

    return segment


def llama(shape: Shape) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    m = shape.model
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=m.dim, intermediate_size=m.ffn_dim, num_hidden_layers=m.depth,
            num_attention_heads=m.n_heads, num_key_value_heads=m.kv_heads, max_position_embeddings=shape.seq,
            tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
        )
    )  # fmt: skip


def hf_loop(shape: Shape) -> Segment:
    model = llama(shape)

    def loss(inputs: Any, targets: Any) -> Any:
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return plain_loop(shape, model, loss)


def hf_trainer(shape: Shape) -> Segment:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    windows = random_windows(shape).reshape(-1, shape.seq + 1)[:, :-1]
    rows = [{"input_ids": w.tolist(), "labels": w.tolist()} for w in windows]
    model = llama(shape)

    def segment() -> Taken:
        marks = Marks(shape)

        class Timing(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *arguments: Any, **named: Any) -> None:
                marks.mark()

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=marks.count, per_device_train_batch_size=shape.batch,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            optim="adamw_torch_fused", learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Timing()])
        trainer.remove_callback(__import__("transformers").PrinterCallback)
        trainer.train()
        return marks.taken()

    return segment


def lingua(shape: Shape, checkout: Path) -> Segment:
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["xformers.ops"].fmha = sys.modules["xformers.ops.fmha"]  # type: ignore[attr-defined]
    sys.modules["xformers.ops"].AttentionBias = object  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    from apps.main.transformer import LMTransformer, LMTransformerArgs  # type: ignore[import-not-found]

    model = LMTransformer(
        LMTransformerArgs(
            dim=shape.dim, n_layers=shape.depth, n_heads=shape.heads, vocab_size=VOCAB, max_seqlen=shape.seq
        )
    )
    model.init_weights()
    return plain_loop(shape, model, lambda inputs, targets: model(inputs, targets))


def sgemm_ceiling(threads: int) -> float:
    """Best GFLOP/s of a 1024^3 float32 multiplication, measured now."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = 0.0
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - began))
    return best / 1e9


def known_rivals(checkout: Path | None) -> dict[str, Callable[[Shape], Segment]]:
    found: dict[str, Callable[[Shape], Segment]] = {"ours": ours, "ours_compiled": lambda shape: ours(shape, True)}
    found |= {"bare": bare, "hf_trainer": hf_trainer, "hf_loop": hf_loop}
    return found | ({"lingua": lambda shape: lingua(shape, checkout)} if checkout is not None else {})


def rival_process(name: str, shape: Shape, threads: int, checkout: Path | None, cache: Path, pipe: Connection) -> None:
    """One segment for each True that comes through the pipe, after a first one that is answered with its seconds."""
    torch.set_num_threads(threads)
    keep_compiled(cache, torch.device("cpu"))
    segment = known_rivals(checkout)[name](shape)
    began = time.perf_counter()
    pipe.send((segment(), time.perf_counter() - began))
    while pipe.recv():
        pipe.send((segment(), 0.0))


def take_turns(
    shape: Shape, rivals: Sequence[str], threads: int, rounds: int, checkout: Path | None, cache: Path
) -> Any:
    """(segments of each rival, seconds of its first segment, the machine's sgemm ceiling in GFLOP/s)."""
    torch.set_num_threads(threads)
    pipes, taken, first, ceiling = {}, {}, {}, 0.0
    for name in rivals:  # one after another, so that first_s means something
        pipes[name], theirs = get_context("spawn").Pipe()
        arguments = (name, shape, threads, checkout, cache, theirs)
        get_context("spawn").Process(target=rival_process, args=arguments, daemon=True).start()
        warm, first[name] = pipes[name].recv()
        taken[name] = [warm]
    for _ in range(rounds):
        ceiling = max(ceiling, sgemm_ceiling(threads))
        for name, pipe in pipes.items():
            pipe.send(True)
            taken[name].append(pipe.recv()[0])
    for pipe in pipes.values():
        pipe.send(False)
    for ours_took, bare_took in zip(taken["ours"], taken["bare"], strict=True):
        assert ours_took.losses == bare_took.losses, "recording changed the training"
    return {name: segments[1:] for name, segments in taken.items()}, first, ceiling


def measure(
    name: str, rivals: Sequence[str], threads: int, rounds: int, checkout: Path | None, cache: Path
) -> dict[str, Any]:
    """The line of one shape; `rivals` must hold `ours` and `bare`."""
    shape = (SHAPES | TINY)[name]
    taken, first, ceiling = take_turns(shape, rivals, threads, rounds, checkout, cache)
    found: dict[str, Any] = {}
    tokens = shape.steps * shape.tokens
    for rival, segments in taken.items():
        fed = [s for s in segments if s.cpu / s.wall >= 0.9] or segments
        speed = tokens / statistics.median(s.wall for s in fed)
        found[rival] = {
            "tokens_per_s": round(speed),
            "cpu_s_per_1k_tokens": round(1000 * statistics.median(s.cpu for s in fed) / tokens, 4),
            "mfu": round(speed * shape.flops_per_token() / (ceiling * 1e9), 3),
            "first_s": round(first[rival], 1),
            "starved": len(segments) - len(fed) if fed is not segments else len(segments),
        }
    return {
        "benchmark": "throughput",
        "shape": name,
        **shape.__dict__,
        "threads": threads,
        "rounds": rounds,
        "sgemm_gflops": round(ceiling, 1),
        "rivals": found,
        "ours_over": ratios(found, "tokens_per_s"),
        "cpu_of_rival_over_ours": ratios(found, "cpu_s_per_1k_tokens"),
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "load": os.getloadavg()[0]},
    }


def ratios(found: dict[str, Any], of: str) -> dict[str, dict[str, float]]:
    """How many times as good ours is as each other one, eager and compiled: more is better for us in both figures."""
    mine = [me for me in ("ours", "ours_compiled") if me in found]

    def ratio(me: str, rival: str) -> float:
        one, other = float(found[me][of]), float(found[rival][of])
        return round(one / other if of == "tokens_per_s" else other / one, 3)

    return {me: {r: ratio(me, r) for r in found if r not in mine} for me in mine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lingua", type=Path, default=None, help="a checkout of facebookresearch/lingua")
    parser.add_argument("--cache", type=Path, default=None, help="folder of compiled kernels; default: a new one")
    parser.add_argument("--tiny", action="store_true", help="a few rivals at the smallest shape: shows that it runs")
    chosen = parser.parse_args()
    kernels = chosen.cache or Path(tempfile.mkdtemp())
    if chosen.tiny:
        print(json.dumps(measure("tiny", TINY_RIVALS, 1, 2, None, kernels)), flush=True)
        return
    for shape in chosen.shapes:
        for threads in chosen.threads:
            rivals = list(known_rivals(chosen.lingua))
            print(json.dumps(measure(shape, rivals, threads, chosen.rounds, chosen.lingua, kernels)), flush=True)


if __name__ == "__main__":
    main()
