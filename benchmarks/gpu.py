"""What the product does on one GPU, end to end and beside others, unattended within a budget of minutes.

    python benchmarks/gpu.py [--minutes 30] [--only NAME ...] [--lingua CHECKOUT] [--tiny]

It needs this package with its dependencies, one CUDA device, a C++ compiler (for torch.compile), some GB in the
temporary folder, and no network: the data are the source text of Python's library and random tokens. One JSON line for
each figure, with the card and the most memory held, and a table at the end. The figures:

    quickstart    seconds of `python -m stabstudy.sweep`: through Ray, its start and the report included
    packs         seconds of 128 trials x 1,000 steps at .25 and 1.3 M parameters by the same command, pack=auto
    one_trial     tokens/s at 1024 x 8 layers, 2,048 x 4 tokens, bf16, all recorded, over Lingua and HF, compiled or not
    recording     a pack of 128 with all recorded over the same with a recorder that does nothing, and without probes
    processes     the trials of `packs` as 16 processes for a tenth of the steps, and trials per hour of the two
    loose         `packs` with kernels that are not deterministic; the two parts above have theirs beside
    one_trial_25  as `one_trial` at 2048 x 25 layers
    long          `packs` and `processes` at 4.9 M parameters, in fp32 a quarter of an hour

Kernels are deterministic, as the product's are, where a line does not say otherwise. A figure for which there is no
time left is named and left out. `processes` train eagerly (compiling in 16 processes at once would take minutes that
they do not earn back), `packs` compiled. The whole steps of the processes follow from a tenth of them: wall time plus
nine times the recorded seconds of all steps over 16. Memory of what runs in other processes is the device's, polled.

`--tiny` runs all of it on a CPU at tiny shapes: that shows only that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gpu_parts
import torch
from gpu_parts import Measured, Place, Shape

from stabstudy.finished import read_parquet
from stabstudy.store import StudyFolder
from stabstudy.trace import TRACE

LOOSE = """
import functools, sys
from stabstudy.training import pack
pack.choose_kernels = functools.partial(pack.choose_kernels, False)
from stabstudy.sweep import main
sys.exit(main(sys.argv[1:]))
"""
"""The command with kernels that are not deterministic; it must train in its own process (launcher=local)."""

STOP_SECONDS = 20.0
"""For a sweep to stop by itself once it is asked to."""

GOALS = {"quickstart": "<= 40 s", "packs 1.3 M": "<= 90 s", "recording 1.3 M": "<= .02", "recording .25 M": "<= .02"}
GOALS |= {f"trials per hour over processes {n}": f">= {x}" for n, x in ((".25 M", 30), ("1.3 M", 10), ("4.9 M", 5))}
GOALS |= {f"{name}: ours over lingua compiled": ">= 1.1" for name in ("one_trial", "one_trial_25")}


@dataclass(frozen=True)
class Size:
    """All that the figures run, on a device or tiny."""

    device: str
    quickstart: tuple[str, ...]  # further words of the command
    packs: dict[str, Shape]
    long: dict[str, Shape]  # as `packs`
    members: int
    steps: int
    processes: int
    recorded: tuple[str, ...]  # the shapes of `packs` at which recording is measured
    large: dict[str, tuple[Shape, bool, int]]  # and whether all rivals fit into memory at once, and rings of a segment
    ring: int
    rounds: int
    compiled: bool


CUDA = Size(
    "cuda",
    (),
    {".25 M": Shape(4, 64, 4, 32, 8), "1.3 M": Shape(6, 128, 4, 256, 8)},
    {"4.9 M": Shape(6, 256, 8, 256, 16)},
    128,
    1000,
    16,
    (".25 M", "1.3 M"),
    {
        "one_trial": (Shape(8, 1024, 8, 2048, 4, 32_000, "bf16", 256), True, 1),
        "one_trial_25": (Shape(25, 2048, 16, 2048, 4, 32_000, "bf16", 256), False, 1),
    },
    32,
    5,
    True,
)
TINY = Size(
    "cpu",
    ("train.steps=4", "model.depth=2", "optim.lr=3e-3", "optim.clip=1.0", "seeds=1"),
    {"tiny": Shape(2, 32, 2, 16, 2)},
    {},
    4,
    20,
    2,
    ("tiny",),
    {
        "one_trial": (Shape(2, 32, 2, 16, 2, 64, multiple_of=32), True, 1),
    },
    4,
    1,
    False,
)


@dataclass
class Bench:
    """One run: its size, its end, and the lines printed so far."""

    size: Size
    folder: Path
    deadline: float  # time.monotonic
    lingua: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def say(
        self, figure: str, value: float, unit: str, peak_gb: float, deterministic: bool = True, **facts: Any
    ) -> None:
        card = torch.cuda.get_device_name() if self.size.device == "cuda" else "cpu"
        line: dict[str, Any] = {"benchmark": "gpu", "figure": figure, "value": float(f"{value:.4g}"), "unit": unit}
        line |= {"deterministic": deterministic, "peak_gb": round(peak_gb, 2), "device": card, **facts}
        self.lines.append(line)
        print(json.dumps(line), flush=True)

    def value(self, figure: str) -> float | None:
        return next((line["value"] for line in self.lines if line["figure"] == figure), None)

    def sweep(self, words: Sequence[str], name: str, loose: bool = False) -> tuple[float, float]:
        """(seconds, peak GB) of the command; raises TimeoutError, RuntimeError where it fails."""
        head = ["-c", LOOSE] if loose else ["-m", "stabstudy.sweep"]
        command = [sys.executable, *head, *words, f"study={name}", f"results_dir={self.folder}"]
        log = self.folder / f"{name}.log"
        with log.open("w") as out, _device_memory() as peak:
            began = time.perf_counter()
            try:
                code = _run(command, out, max(1.0, self.deadline - time.monotonic()))
            except TimeoutError:
                print(f"{name}: no time is left\n{log.read_text()[-500:]}", file=sys.stderr, flush=True)
                raise
            took = time.perf_counter() - began
        if code:
            raise RuntimeError(f"{' '.join(words)}: exit code {code}\n{log.read_text()[-2000:]}")
        return took, peak[0]


def _run(command: Sequence[str], out: TextIO, seconds: float) -> int:
    """The exit code of a command; behind its time it is asked to stop, then killed with all that it started."""
    with subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError from None


@contextmanager
def _device_memory() -> Iterator[list[float]]:
    """[GB] of the device that are used at most while this lasts, by all processes; [0] without a device."""
    peak, done = [0.0], threading.Event()

    def poll() -> None:
        while not done.wait(0.25):
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], (total - free) / 1e9)

    thread = threading.Thread(target=poll, daemon=True)
    if torch.cuda.is_available():
        thread.start()
    try:
        yield peak
    finally:
        done.set()
        if thread.is_alive():
            thread.join()


def quickstart(bench: Bench) -> None:
    seconds, peak = bench.sweep(
        ["sweep=quickstart", *_device_words(bench, "auto"), *bench.size.quickstart], "quickstart"
    )
    bench.say("quickstart", seconds, "s", peak)


def packs(bench: Bench, loose: bool = False, shapes: Mapping[str, Shape] | None = None) -> None:
    size = bench.size
    for name, shape in (size.packs if shapes is None else shapes).items():
        local = _local(size) or (["launcher=local"] if loose else [])
        pack = "auto" if size.device == "cuda" else str(size.members)
        words = [*_trials(size, shape, size.steps, size.compiled), *_device_words(bench, pack), *local]
        figure = f"packs {name}" + (", kernels not deterministic" if loose else "")
        seconds, peak = bench.sweep(words, f"packs{'-loose' if loose else ''}-{name.replace(' ', '')}", loose)
        hour = size.members * 3600 / seconds
        bench.say(
            figure,
            seconds,
            "s",
            peak,
            not loose,
            trials_per_hour=round(hour),
            ms_per_trial_step=_per_step(size, seconds),
        )


def processes(bench: Bench, shapes: Mapping[str, Shape] | None = None) -> None:
    size = bench.size
    for name, shape in (size.packs if shapes is None else shapes).items():
        words = _trials(size, shape, size.steps // 10, compiled=False)
        words += [*_device_words(bench, "1", 1 / size.processes), *_local(size)]
        study = f"processes-{name.replace(' ', '')}"
        seconds, peak = bench.sweep(words, study)
        folders = StudyFolder(bench.folder / study).trials()
        steps = sum(float(read_parquet(f.finished(TRACE), TRACE)["seconds"].sum()) for f in folders)
        whole = seconds + 9 * steps / size.processes
        facts: dict[str, Any] = {"of_a_tenth_s": round(seconds, 1), "ms_per_trial_step": _per_step(size, whole)}
        bench.say(f"processes {name}", whole, "s", peak, **facts)
        if packed := bench.value(f"packs {name}"):
            bench.say(f"trials per hour over processes {name}", whole / packed, "x", peak)


def long(bench: Bench) -> None:
    packs(bench, shapes=bench.size.long)
    processes(bench, shapes=bench.size.long)


def recording(bench: Bench) -> None:
    size = bench.size
    for name in size.recorded:
        place = Place(size.device, bench.folder / f"recording-{name.replace(' ', '')}", size.compiled, 4, size.ring)
        makes = [partial(gpu_parts.recording, size.packs[name], size.members, place, d) for d in (True, False)]
        found = gpu_parts.in_turns(makes, size.rounds, False, bench.deadline)
        for suffix in ("", ", kernels not deterministic"):
            on, off, no_probes = (found[f"{part}{suffix}"] for part in ("on", "off", "no probes"))
            facts = {
                "on_s": round(on.seconds, 4),
                "off_s": round(off.seconds, 4),
                "steps": place.steps,
                "members": size.members,
            }
            bench.say(
                f"recording {name}{suffix}", on.seconds / off.seconds - 1, "share", on.peak_gb, not suffix, **facts
            )
            share = on.seconds / no_probes.seconds - 1
            bench.say(f"probes {name}{suffix}", share, "share", on.peak_gb, not suffix)


def one_trial(bench: Bench, name: str) -> None:
    if name not in bench.size.large:  # tiny: a shape more would show nothing more
        return
    shape, together, rings = bench.size.large[name]
    place = Place(bench.size.device, bench.folder / name, bench.size.compiled, rings, bench.size.ring)
    makes = gpu_parts.one_trial(shape, place, bench.lingua, bench.size.compiled)
    found: dict[str, Measured] = gpu_parts.in_turns(makes, bench.size.rounds, together, bench.deadline)
    for part, measured in found.items():
        speed = place.steps * shape.tokens / measured.seconds
        bench.say(f"{name}: {part}", speed, "tokens/s", measured.peak_gb, part == "ours", in_turns=together)
    for mine in ("ours", "ours, kernels not deterministic"):
        for part in (part for part in found if not part.startswith("ours")):
            ratio = found[part].seconds / found[mine].seconds
            bench.say(f"{name}: {mine} over {part}", ratio, "x", found[mine].peak_gb, mine == "ours")


def _trials(size: Size, shape: Shape, steps: int, compiled: bool) -> list[str]:
    """Words of a study of `members` trials of a shape: 16 rates, or half as many as there are trials."""
    rates = min(16, size.members // 2)
    words = [f"model.depth={shape.depth}", f"model.dim={shape.dim}", f"model.n_heads={shape.heads}"]
    words += [f"data.seq_len={shape.seq}", f"train.batch_size={shape.batch}", f"train.steps={steps}"]
    words += [f"optim.lr={{log:[1e-4,3e-3],num:{rates}}}", f"seeds={size.members // rates}"]
    words += ["optim.warmup_steps=null", "optim.warmup_share=0.05"]
    return [*words, f"train.compile={'on' if compiled else 'off'}"]


def _device_words(bench: Bench, pack: str, share: float = 1.0) -> list[str]:
    if bench.size.device == "cpu":
        return [f"compute.pack={'1' if pack == 'auto' else pack}", "compute.gpus_per_pack=0"]
    return [f"compute.pack={pack}", f"compute.gpus_per_pack={share:g}", "compute.cpus_per_pack=1", "compute.threads=1"]


def _local(size: Size) -> list[str]:
    """A tiny run starts Ray once only, for the quickstart."""
    return ["launcher=local"] if size.device == "cpu" else []


def _per_step(size: Size, seconds: float) -> float:
    return float(f"{1000 * seconds / size.members / size.steps:.3g}")


FIGURES: dict[str, Callable[[Bench], None]] = {
    "quickstart": quickstart,
    "packs": packs,
    "one_trial": partial(one_trial, name="one_trial"),
    "recording": recording,
    "processes": processes,
    "loose": partial(packs, loose=True),
    "one_trial_25": partial(one_trial, name="one_trial_25"),
    "long": long,
}
"""In the order in which they are measured: what may be skipped comes last."""


def measure(size: Size, minutes: float, only: Sequence[str], lingua: Path | None) -> Bench:
    """Measure all figures, or those named, until the time is over; each is printed as soon as it is known."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        bench = Bench(size, Path(folder), time.monotonic() + 60 * minutes, lingua)
        os.environ.setdefault("STABSTUDY_CACHE", str(Path(folder) / "tokens"))
        for name in only or FIGURES:
            try:
                if time.monotonic() >= bench.deadline:
                    raise TimeoutError
                FIGURES[name](bench)
            except TimeoutError:
                bench.skipped.append(name)
            except RuntimeError as error:  # the others are still worth having
                bench.skipped.append(f"{name} (failed)")
                print(f"{name}: {error}", file=sys.stderr, flush=True)
    return bench


def table(bench: Bench) -> str:
    """The lines as a table of Markdown."""
    rows = [
        f"| {x['figure']} | {x['value']} {x['unit']} | {GOALS.get(x['figure'], '')} | {x['peak_gb']} |"
        for x in bench.lines
    ]
    head = f"| on {bench.lines[0]['device'] if bench.lines else '-'} | | goal | peak GB |\n|---|---:|---:|---:|"
    return "\n".join([head, *rows, f"\nleft out: {', '.join(bench.skipped) or 'nothing'}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=[])
    parser.add_argument("--lingua", type=Path, default=None, help="a checkout of facebookresearch/lingua")
    parser.add_argument("--tiny", action="store_true", help="all of it at tiny shapes, on a CPU")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device (--tiny runs on a CPU)", file=sys.stderr)
        return 4
    bench = measure(TINY if given.tiny else CUDA, given.minutes, given.only, given.lingua)
    print(table(bench))
    return 1 if any("failed" in name for name in bench.skipped) else 0


if __name__ == "__main__":
    sys.exit(main())
