"""The parts of gpu.py that train without a study: large trials, their rivals, a pack with and without its record.

Each part runs in a fresh process (`in_turns`), so that the choice of deterministic kernels, compiled code and memory of
one does not reach the next. Segments of the parts take turns; a part's seconds are the median of its segments.
"""

from __future__ import annotations

import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import trainer
from torch import Tensor

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.training import loop as loops
from stabstudy.training import pack
from stabstudy.training.driver import Due, Taken, Tick
from stabstudy.training.loop import Loop, Progress
from stabstudy.training.pack import keep_freed_memory
from stabstudy.training.step import keep_compiled

LR, CLIP = 1e-3, 1.0


@dataclass(frozen=True)
class Shape:
    """Model, sequence length, sequences per step, vocabulary."""

    depth: int
    dim: int
    heads: int
    seq: int
    batch: int
    vocab: int = 256
    precision: str = "fp32"
    multiple_of: int = 32  # of the feed-forward width; Lingua's is 256

    def config(self, seed: int = 0) -> TrialConfig:
        return TrialConfig(
            model=ModelConfig(depth=self.depth, dim=self.dim, n_heads=self.heads, multiple_of=self.multiple_of),
            optim=OptimConfig(lr=LR, clip=CLIP),
            data=DataConfig(seq_len=self.seq),
            train=TrainConfig(
                steps=10**6, batch_size=self.batch, precision=self.precision, eval_sequences=8, eval_every=250
            ),
            seed=seed,
        )

    @property
    def tokens(self) -> int:
        return self.seq * self.batch


@dataclass(frozen=True)
class Place:
    """Where a part runs, and how long its segments are."""

    device: str
    folder: Path  # for records and compiled code
    compiled: bool
    rings: int  # of a segment
    ring: int

    @property
    def steps(self) -> int:
        return self.rings * self.ring


Segment = Callable[[], None]
Make = Callable[[], Mapping[str, Segment]]
"""Sets a part up in its process: its segments by name."""


@dataclass(frozen=True)
class Measured:
    """Median seconds of a segment, and the most device memory that its process has held, GB."""

    seconds: float
    peak_gb: float


def in_turns(makes: Sequence[Make], rounds: int, together: bool, deadline: float) -> dict[str, Measured]:
    """Run the parts, each in a process of its own. `together`: all are there at once and take turns.

    Those that do not fit into the device's memory together run one after another. Raises TimeoutError behind `deadline`
    (time.monotonic), RuntimeError for a process that ends early.
    """
    if not together:
        return {name: m for make in makes for name, m in in_turns([make], rounds, True, deadline).items()}
    context = get_context("spawn")
    taken: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    processes, pipes = [], []
    try:
        for make in makes:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(make, theirs), daemon=True)
            process.start()
            processes.append(process)
            pipes.append(ours)
            theirs.close()
            _receive(ours, deadline)  # set up and warm, one after another
        for _ in range(rounds):
            for pipe in pipes:
                pipe.send(True)
                for name, seconds, peak in _receive(pipe, deadline):
                    taken.setdefault(name, []).append(seconds)
                    peaks[name] = peak
    finally:
        for process in processes:
            process.kill()
            process.join()
    return {name: Measured(statistics.median(seconds), peaks[name]) for name, seconds in taken.items()}


def _receive(pipe: Connection, deadline: float) -> Any:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a part ended early; its message is above") from None


def _serve(make: Make, pipe: Connection) -> None:
    """A round of every segment for each True that comes."""
    segments = make()
    for segment in segments.values():
        segment()
    pipe.send(None)
    while pipe.recv():
        pipe.send([(name, _seconds(segment), peak_gb()) for name, segment in segments.items()])


def _seconds(segment: Segment) -> float:
    _wait()
    began = time.perf_counter()
    segment()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_gb() -> float:
    """Device memory that this process has held at most; 0 without a device."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else 0.0


def own_loop(shape: Shape, members: int, place: Place, deterministic: bool, name: str) -> tuple[Loop, Segment]:
    """A pack as the product runs it, and the segment that is so many rings of its loop."""
    pack.choose_kernels(deterministic)
    torch.set_num_threads(1)
    keep_freed_memory()
    keep_compiled(place.folder / "compiled", torch.device(place.device))
    rings = 0

    def heartbeat(progress: Sequence[Progress]) -> bool:
        nonlocal rings
        rings += 1
        return rings % place.rings == 0

    configs = [shape.config(seed) for seed in range(members)]
    where = place.folder / name
    loop = trainer.loop_of(
        configs, shape.vocab, torch.device(place.device), where, heartbeat, place.compiled, place.ring
    )

    def segment() -> None:
        # rings of one length, so that a segment is so many steps; the product cuts them where a step is slow
        with mock.patch.multiple(loops, RING_SECONDS=1e9, SLOW_STEP=1e9):
            loop.run()

    return loop, segment


def ours(shape: Shape, place: Place, deterministic: bool) -> Mapping[str, Segment]:
    """One trial, everything recorded."""
    name = "ours" if deterministic else "ours, kernels not deterministic"
    return {name: own_loop(shape, 1, place, deterministic, name)[1]}


def recording(shape: Shape, members: int, place: Place, deterministic: bool) -> Mapping[str, Segment]:
    """The same pack with everything recorded, with a recorder that does nothing, and without probes."""
    suffix = "" if deterministic else ", kernels not deterministic"
    loop, segment = own_loop(shape, members, place, deterministic, f"pack{suffix}")
    recorder = loop.recorder

    def count(places: Sequence[int], ticks: Sequence[Tick], taken: Taken, seconds: float) -> dict[int, int]:
        recorder.rows[list(places)] += len(ticks)
        recorder.seconds = seconds
        return {}

    def without_record() -> None:
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(recorder, "judge", count))
            stack.enter_context(mock.patch.object(recorder, "write", lambda: None))
            segment()

    def without_probes() -> None:
        with mock.patch.object(loop, "_due", lambda n: [Due.NOTHING] * n):
            segment()

    return {f"on{suffix}": segment, f"off{suffix}": without_record, f"no probes{suffix}": without_probes}


def rival(kind: str, shape: Shape, place: Place, compiled: bool, checkout: Path | None) -> Mapping[str, Segment]:
    """A plain loop: zero_grad, forward, backward, clip, step; the norm is computed and dropped."""
    device = torch.device(place.device)
    keep_compiled(place.folder / "compiled", device)
    model, loss_of = hf(shape) if kind == "hf" else lingua(shape, checkout)
    model = model.to(device)
    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = np.random.default_rng(0).integers(0, shape.vocab, (8, shape.batch, shape.seq + 1))

    def segment() -> None:
        for i in range(place.steps):
            tokens = torch.from_numpy(batches[i % len(batches)]).to(device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=shape.precision == "bf16"):
                loss = loss_of(tokens[:, :-1], tokens[:, 1:])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()

    return {f"{kind} compiled" if compiled else kind: segment}


Loss = Callable[[Tensor, Tensor], Tensor]


def hf(shape: Shape) -> tuple[torch.nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    m = shape.config().model
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=m.dim, intermediate_size=m.ffn_dim, num_hidden_layers=m.depth,
        num_attention_heads=m.n_heads, num_key_value_heads=m.kv_heads, max_position_embeddings=shape.seq,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).logits.flatten(0, 1).float(), targets.flatten())

    return model, loss


def lingua(shape: Shape, checkout: Path | None) -> tuple[torch.nn.Module, Loss]:
    """Lingua's own Transformer; three of its imports that this needs none of are empty stubs."""
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["xformers.ops"].fmha = sys.modules["xformers.ops.fmha"]  # type: ignore[attr-defined]
    sys.modules["xformers.ops"].AttentionBias = object  # type: ignore[attr-defined]
    sys.path.insert(0, str(checkout))
    from apps.main.transformer import LMTransformer, LMTransformerArgs  # type: ignore[import-not-found]

    arguments = LMTransformerArgs(
        dim=shape.dim, n_layers=shape.depth, n_heads=shape.heads, vocab_size=shape.vocab, max_seqlen=shape.seq
    )
    model = LMTransformer(arguments)
    model.init_weights()
    return model, lambda inputs, targets: model(inputs, targets)


def one_trial(shape: Shape, place: Place, checkout: Path | None, compiled: bool) -> list[Make]:
    """Ours with and without deterministic kernels, and the rivals, compiled and not where there is a compiler."""
    makes: list[Make] = [partial(ours, shape, place, deterministic) for deterministic in (True, False)]
    kinds = [*(["lingua"] if checkout else []), "hf"]
    ways = (True, False) if compiled else (False,)
    return makes + [partial(rival, kind, shape, place, way, checkout) for kind in kinds for way in ways]
