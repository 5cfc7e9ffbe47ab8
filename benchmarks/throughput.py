"""Tokens per second of this trainer, everything recorded, against what people would use instead, in one run.

    python benchmarks/throughput.py [--threads 1 2] [--shapes h d64 d256] [--rounds 7] [--lingua PATH]

Rivals: `lingua` (its own Transformer in a plain loop, from a checkout at PATH; three of its imports that a CPU lacks
are empty stubs here), `hf_trainer` (transformers.Trainer on LlamaForCausalLM, logging every step), `hf_loop` (a plain
loop on the same model). All train the same shape in float32 with fused AdamW and clipping at 1.0 on the same random
tokens. Ours runs the real loop: every trace column at every step, written to disk, probes every 10 steps.

Segments of the rivals take turns, so that a change of the machine's speed meets all of them; figures are medians over
the rounds. A segment whose process did not get its cores (CPU seconds per wall second below .9 a thread for one thread)
is counted in `starved` and left out where others remain. One JSON line for each (shape, threads).
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import LiveSpikes
from stabstudy.stability.verdict import DivergenceMonitor
from stabstudy.trace import PROBES, TRACE, RowWriter
from stabstudy.training.loop import Loop, Progress
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.record import Recorder
from stabstudy.training.step import Stepper

VOCAB = 256
STEPS, WARM = 10, 2
"""Timed steps in a segment, and steps before them that are not timed."""


@dataclass(frozen=True)
class Shape:
    """Model, sequence length and sequences per step."""

    depth: int
    dim: int
    heads: int
    seq: int
    batch: int

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


SHAPES = {"h": Shape(4, 128, 4, 256, 8), "d64": Shape(6, 64, 4, 128, 8), "d256": Shape(8, 256, 4, 256, 8)}


class Marks:
    """(wall, CPU) at the end of each step."""

    def __init__(self) -> None:
        self.at: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.at.append((time.perf_counter(), time.process_time()))

    def timed(self) -> tuple[float, float]:
        (wall, cpu), (end_wall, end_cpu) = self.at[WARM - 1], self.at[WARM + STEPS - 1]
        return end_wall - wall, end_cpu - cpu


class RandomBatches:
    """The interface of data.batches.Batches over fixed random tokens."""

    def __init__(self, shape: Shape):
        self.windows = np.random.default_rng(0).integers(0, VOCAB, (64, shape.batch, shape.seq + 1))

    def batch(self, step: int) -> Any:
        return self.windows[step % len(self.windows)]

    def evaluation(self) -> Any:
        return self.windows[0]


def ours(shape: Shape, compiled: bool = False) -> Callable[[], tuple[float, float]]:
    train = TrainConfig(steps=10**6, batch_size=shape.batch, eval_every=10**8, checkpoint_every=10**8, compile=compiled)
    config = TrialConfig(model=shape.model, optim=OptimConfig(lr=1e-3), data=DataConfig(seq_len=shape.seq), train=train)
    model = Decoder(config.model, VOCAB, shape.seq)
    initialise(model, config.model, 0)
    stepper = Stepper(config, model, torch.device("cpu"))
    folder = Path(tempfile.mkdtemp())
    rules = Rules()
    recorder = Recorder(
        config,
        stepper.layer_index,
        RowWriter(folder / "trace.jsonl", TRACE),
        DivergenceMonitor(rules, 10**6, 0, 6.0),
        LiveSpikes(rules),
        on_device=False,
    )
    probes = RowWriter(folder / "probes.jsonl", PROBES)

    def segment() -> tuple[float, float]:
        marks = Marks()

        def heartbeat(progress: Progress) -> bool:
            marks.mark()
            return len(marks.at) == WARM + STEPS

        Loop(config, stepper, RandomBatches(shape), recorder, probes, lambda step: None, heartbeat).run(recorder.rows)  # type: ignore[arg-type]
        return marks.timed()

    return segment


def plain_loop(shape: Shape, model: torch.nn.Module, loss_of: Callable[[Any, Any], Any]) -> Callable[[], Any]:
    """zero_grad, forward, backward, clip, step: the least that anybody writes; the norm is computed and dropped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = RandomBatches(shape)

    def segment() -> tuple[float, float]:
        marks = Marks()
        for step in range(WARM + STEPS):
            windows = torch.from_numpy(batches.batch(step))
            optimizer.zero_grad()
            loss_of(windows[:, :-1], windows[:, 1:]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            marks.mark()
        return marks.timed()

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


def hf_loop(shape: Shape) -> Callable[[], Any]:
    model = llama(shape)

    def loss(inputs: Any, targets: Any) -> Any:
        logits = model(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return plain_loop(shape, model, loss)


def hf_trainer(shape: Shape) -> Callable[[], Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.set_verbosity_error()
    windows = RandomBatches(shape).windows.reshape(-1, shape.seq + 1)[:, :-1]
    rows = [{"input_ids": w.tolist(), "labels": w.tolist()} for w in windows]
    model = llama(shape)

    def segment() -> tuple[float, float]:
        marks = Marks()

        class Timing(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *arguments: Any, **named: Any) -> None:
                marks.mark()

        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=WARM + STEPS, per_device_train_batch_size=shape.batch,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            optim="adamw_torch_fused", learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Timing()])
        trainer.remove_callback(__import__("transformers").PrinterCallback)
        trainer.train()
        return marks.timed()

    return segment


def lingua(shape: Shape, checkout: Path) -> Callable[[], Any]:
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


def measure(name: str, threads: int, rounds: int, checkout: Path | None, compiled: bool) -> dict[str, Any]:
    torch.set_num_threads(threads)
    shape = SHAPES[name]
    rivals: dict[str, Callable[[], Any]] = {
        "ours": ours(shape),
        "hf_trainer": hf_trainer(shape),
        "hf_loop": hf_loop(shape),
    }
    if checkout is not None:
        rivals["lingua"] = lingua(shape, checkout)
    if compiled:
        rivals["ours_compiled"] = ours(shape, compiled=True)
    ceiling = 0.0
    taken: dict[str, list[tuple[float, float]]] = {rival: [] for rival in rivals}
    for _ in range(rounds):
        ceiling = max(ceiling, sgemm_ceiling(threads))
        for rival, segment in rivals.items():
            taken[rival].append(segment())
    found: dict[str, Any] = {}
    tokens = STEPS * shape.tokens
    for rival, segments in taken.items():
        fed = [s for s in segments if s[1] / s[0] >= 0.9] or segments
        speed = tokens / statistics.median(wall for wall, _ in fed)
        found[rival] = {
            "tokens_per_s": round(speed),
            "cpu_s_per_1k_tokens": round(1000 * statistics.median(cpu for _, cpu in fed) / tokens, 4),
            "mfu": round(speed * shape.flops_per_token() / (ceiling * 1e9), 3),
            "starved": len(segments) - len(fed) if fed is not segments else len(segments),
        }
    ratios = {r: round(found["ours"]["tokens_per_s"] / f["tokens_per_s"], 3) for r, f in found.items() if r != "ours"}
    return {
        "benchmark": "throughput",
        "shape": name,
        **shape.__dict__,
        "threads": threads,
        "rounds": rounds,
        "sgemm_gflops": round(ceiling, 1),
        "rivals": found,
        "ours_over": ratios,
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "load": os.getloadavg()[0]},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lingua", type=Path, default=None, help="a checkout of facebookresearch/lingua")
    parser.add_argument("--compile", action="store_true", help="also ours with train.compile=true")
    chosen = parser.parse_args()
    for shape_name in chosen.shapes:
        for count in chosen.threads:
            print(json.dumps(measure(shape_name, count, chosen.rounds, chosen.lingua, chosen.compile)), flush=True)
