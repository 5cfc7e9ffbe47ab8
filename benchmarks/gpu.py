"""Tokens per second on one CUDA device at Lingua's shapes, in bf16 autocast: ours in three modes, and the rivals.

    python benchmarks/gpu.py [--shapes 1024x8 1024x10 2048x25] [--steps 20] [--rounds 5] [--lingua PATH]

Ours runs Stepper and Recorder (a ring of steps, one copy to the host for 32) in the modes `eager`, `compile` (the loss
function) and `graph`: the whole step, norms, clip and AdamW included, captured once and replayed. `bare` drops each
step's vector on the device instead of recording it. Rivals: `hf_loop` and `lingua`, plain loops as in throughput.py.
Segments take turns; figures are medians; MFU is against the best bf16 product measured in the same run.

On a CPU (`--device cpu --shapes tiny`) it runs without the graph: that shows only that it works.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stabstudy.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, TrialConfig
from stabstudy.live import Writer
from stabstudy.stability.rules import Rules
from stabstudy.stability.summary import LiveSpikes
from stabstudy.stability.verdict import DivergenceMonitor
from stabstudy.trace import TRACE, widths
from stabstudy.training import clip
from stabstudy.training.model import Decoder, initialise
from stabstudy.training.record import Recorder
from stabstudy.training.step import Stepper

LR, CLIP = 1e-3, 1.0
GRAPH_WARM = 3
"""Steps on a side stream before the capture, as torch asks for: libraries set themselves up in them."""


@dataclass(frozen=True)
class Shape:
    """Model, sequence length, sequences per step, vocabulary."""

    depth: int
    dim: int
    heads: int
    seq: int = 2048
    batch: int = 4
    vocab: int = 32_000

    @property
    def config(self) -> TrialConfig:
        return TrialConfig(
            model=ModelConfig(depth=self.depth, dim=self.dim, n_heads=self.heads, multiple_of=256),
            optim=OptimConfig(lr=LR, clip=CLIP),
            data=DataConfig(seq_len=self.seq),
            train=TrainConfig(steps=10**6, batch_size=self.batch, precision="bf16"),
        )

    def flops(self) -> float:
        """Of a step: 6 for each parameter of a matrix and token, 12 * depth * dim * seq for attention."""
        matrices = self.config.model.parameters(self.vocab) - self.vocab * self.dim
        return self.batch * self.seq * (6.0 * matrices + 12 * self.depth * self.dim * self.seq)


SHAPES = {
    "1024x8": Shape(8, 1024, 8),
    "1024x10": Shape(10, 1024, 8),
    "2048x25": Shape(25, 2048, 16),
    "tiny": Shape(2, 32, 2, seq=16, batch=2, vocab=64),
}

Step = Callable[[int], None]
"""One optimizer step on batch i; waits for nothing."""


def windows(shape: Shape) -> Any:
    """Eight batches of random tokens, [8, batch, seq + 1]."""
    return np.random.default_rng(0).integers(0, shape.vocab, (8, shape.batch, shape.seq + 1))


def stepper_of(shape: Shape, device: torch.device, compiled: bool) -> Stepper:
    model = Decoder(shape.config.model, shape.vocab, shape.seq)
    initialise(model, shape.config.model, 0)
    return Stepper(shape.config, model.to(device), device, compiled)


def ours(shape: Shape, device: torch.device, mode: str, record: bool) -> Step:
    """Ours in a mode; `record` False: the vector of a step is dropped on the device."""
    stepper, batches = stepper_of(shape, device, mode == "compile"), windows(shape)
    vector_of = captured(stepper, shape) if mode == "graph" else lambda batch: stepper.step(batch, LR)
    rules, folder = Rules(), Path(tempfile.mkdtemp())
    recorder = Recorder(
        shape.config,
        stepper.layer_index,
        Writer(folder / "trace.live", TRACE, widths(shape.config.model.depth)),
        DivergenceMonitor(rules, 10**6, 0, 12.0),
        LiveSpikes(rules),
        on_device=device.type != "cpu",
    )

    def step(i: int) -> None:
        vector = vector_of(batches[i % len(batches)])
        if record:
            recorder.add(recorder.rows + len(recorder.pending), LR, vector)

    return step


def captured(stepper: Stepper, shape: Shape) -> Callable[[Any], Tensor]:
    """The whole step as one CUDA graph: batch and lr are read from fixed places on the device, nothing waits."""
    if stepper.device.type != "cuda":
        raise SystemExit("mode graph needs a CUDA device")
    batch = torch.zeros((shape.batch, shape.seq + 1), dtype=torch.int64, device=stepper.device)
    # float32, which the fused kernel takes as it takes a float; lr.fill_() follows a schedule
    lr: Any = torch.tensor(LR, device=stepper.device)
    scale = torch.ones((), device=stepper.device)

    def whole() -> Tensor:
        stepper.model.zero_grad()
        sums = stepper._sums(batch[:, :-1], batch[:, 1:], False)
        valid = shape.batch * shape.seq
        loss = sums.cross_entropy / valid
        loss.backward()  # type: ignore[no-untyped-call]
        grads = clip.gradients(stepper.parameters)
        norms = clip.tensor_norms(grads)
        norm = torch.linalg.vector_norm(norms)
        assert stepper.clip_rule is not None
        factor = stepper.clip_rule.apply(grads, norms, norm)
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss.detach()))).float()
        stepper.optimizer.step(lr, bad)
        head = [loss.detach(), sums.logit_absmax, sums.logz / valid, norm, factor, scale, bad * 0]
        return torch.cat([torch.stack(head), norms])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM):
            whole()
    torch.cuda.current_stream().wait_stream(side)
    stepper.model.zero_grad()  # gradients are born in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        vector = whole()

    def step(tokens: Any) -> Tensor:
        batch.copy_(torch.from_numpy(tokens).pin_memory(), non_blocking=True)
        graph.replay()
        return vector.clone()  # the next replay writes to the same place

    return step


def plain(
    shape: Shape, device: torch.device, model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> Step:
    """zero_grad, forward, backward, clip, step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = windows(shape)

    def step(i: int) -> None:
        tokens = torch.from_numpy(batches[i % len(batches)]).to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_of(tokens[:, :-1], tokens[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step


def hf_loop(shape: Shape, device: torch.device) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    m = shape.config.model
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=m.dim, intermediate_size=m.ffn_dim, num_hidden_layers=m.depth,
        num_attention_heads=m.n_heads, num_key_value_heads=m.kv_heads, max_position_embeddings=shape.seq,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).logits.flatten(0, 1).float(), targets.flatten())

    return plain(shape, device, model, loss)


def lingua(shape: Shape, device: torch.device, checkout: Path) -> Step:
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
    return plain(shape, device, model.to(device), lambda inputs, targets: model(inputs, targets))


def finished(device: torch.device) -> float:
    """The clock once the device has done everything asked of it so far."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ceiling(device: torch.device, size: int) -> float:
    """Best FLOP/s of a size^3 bf16 product."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = finished(device)
        a @ b
        best = max(best, 2 * size**3 / (finished(device) - began))
    return best


def measure(name: str, device: torch.device, steps: int, rounds: int, checkout: Path | None) -> dict[str, Any]:
    """One shape. Each rival is built, timed and thrown away in each round: two large models may not fit together."""
    shape, cuda = SHAPES[name], device.type == "cuda"
    makers: dict[str, Callable[[], Step]] = {
        mode: lambda mode=mode: ours(shape, device, mode, True)  # type: ignore[misc]
        for mode in ("eager", "compile", *(["graph"] if cuda else []))
    }
    makers |= {"eager_bare": lambda: ours(shape, device, "eager", False), "hf_loop": lambda: hf_loop(shape, device)}
    if checkout is not None:
        makers["lingua"] = lambda: lingua(shape, device, checkout)
    seconds: dict[str, list[float]] = {rival: [] for rival in makers}
    memory = dict.fromkeys(makers, 0)
    limit = ceiling(device, 8192 if cuda else 256)
    for _ in range(rounds):
        for rival, make in makers.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            step = make()
            for i in range(3):
                step(i)
            began = finished(device)
            for i in range(steps):
                step(i)
            seconds[rival].append((finished(device) - began) / steps)
            memory[rival] = torch.cuda.max_memory_allocated() if cuda else 0
            del step
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
    found = {
        rival: {
            "tokens_per_s": round(shape.batch * shape.seq / statistics.median(taken)),
            "mfu": round(shape.flops() / statistics.median(taken) / limit, 3),
            "peak_gb": round(memory[rival] / 1e9, 2),
        }
        for rival, taken in seconds.items()
    }
    return {
        "benchmark": "gpu",
        "shape": name,
        **asdict(shape),
        "rounds": rounds,
        "bf16_tflops": round(limit / 1e12, 2),
        "rivals": found,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[s for s in SHAPES if s != "tiny"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lingua", type=Path, default=None, help="a checkout of facebookresearch/lingua")
    chosen = parser.parse_args()
    for shape_name in chosen.shapes:
        line = measure(shape_name, torch.device(chosen.device), chosen.steps, chosen.rounds, chosen.lingua)
        print(json.dumps(line), flush=True)
