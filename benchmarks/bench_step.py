"""The PUAT step: the official code's (eager_baseline.py) and ours, ms per step and phase, images/s, memory, TFLOP/s.

All are interleaved step by step in one process, on synthetic images that lie on the device; loading is outside the
clock. `verbatim` is the official step as published, `eager` the same without torch.cuda.empty_cache() (on a CPU the two
are one, and only `eager` is run); `paper` and `official-v1` are presets of our eager engine. The compiled and captured
step is not here yet. The speed-up to quote is that of `official-v1`, which computes what the baselines compute.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import time
from contextlib import nullcontext
from typing import Any

import ceilings
import eager_baseline
import flops
import numpy as np
import profiling
import timing
import torch

from puat_fast.config import Config
from puat_fast.data.batch import StepBatch
from puat_fast.data.loaders.resident import ResidentLoader
from puat_fast.data.sampler import SemiSupervisedSampler
from puat_fast.engine.stats import NonFiniteError
from puat_fast.engine.step import Engine
from puat_fast.methods import Phase
from puat_fast.networks import Networks
from puat_fast.noise import Noise
from puat_fast.ops import reference_only

PRESETS = ("paper", "official-v1")
PHASES = ("D", "G", "A", "C", "rest")
STEPS_PER_EPOCH = 196  # of CIFAR: what the schedules see


class PhaseClock:
    """Times of the phases of every step of an engine, taken from outside: it replaces `engine._update`.

    The teacher follows in C's; `rest` is what comes after the last update. On a GPU the marks are CUDA events, read
    at the end.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine, self.on_gpu = engine, device.type == "cuda"
        self.steps: list[list[tuple[str, Any]]] = []
        self._update = engine._update
        engine._update = self._timed_update  # type: ignore[method-assign]

    def step(self, batch: StepBatch) -> None:
        """One step of the engine."""
        self.steps.append([("start", self._now())])
        self.engine.step(batch)
        self._mark("rest")

    def _timed_update(self, phase: Phase, *args: Any) -> None:
        self._update(phase, *args)
        self._mark(phase.net)

    def _mark(self, name: str) -> None:
        self.steps[-1].append((name, self._now()))

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times(self, last: int) -> dict[str, timing.Times]:
        """Milliseconds per phase (the D updates of a step together), over the last steps."""
        samples: dict[str, list[float]] = {}
        for marks in self.steps[-last:]:
            spent: dict[str, float] = {}
            for (_, a), (name, b) in itertools.pairwise(marks):
                spent[name] = spent.get(name, 0.0) + (a.elapsed_time(b) if self.on_gpu else (b - a) * 1e3)
            for name, ms in spent.items():
                samples.setdefault(name, []).append(ms)
        return {name: timing.Times.of(samples[name]) for name in PHASES if name in samples}


def make_config(preset: str, args: argparse.Namespace) -> Config:
    """The preset at the sizes of the command line."""
    return Config.preset(
        preset,
        dataset=args.dataset,
        classifier={"depth": args.depth, "width": args.width},
        gan={"width": args.gan_width},
        schedule={"batch_size": args.batch_size},
    )


def make_batches(config: Config, device: torch.device, count: int = 2) -> list[StepBatch]:
    """StepBatches of random images, gathered by the resident loader."""
    n, rng = max(512, 2 * config.schedule.batch_size), np.random.default_rng(0)
    labels = rng.integers(0, flops.NUM_CLASSES[config.dataset], n)
    images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    sampler = SemiSupervisedSampler(np.arange(n // 2), np.arange(n // 2, n), config.schedule.batch_size, seed=0)
    loader = ResidentLoader(images, labels, sampler, device)
    return [loader.next_step(config.schedule.n_disc) for _ in range(count)]


def make_engine(config: Config, device: torch.device) -> Engine:
    """An engine in stage 2, with fresh networks."""
    noise = Noise(config.seed, device)
    nets = Networks.build(config, flops.NUM_CLASSES[config.dataset], noise)
    engine = Engine(config, nets, noise, STEPS_PER_EPOCH)
    if engine.stage == 1:
        engine.begin_stage2()
    return engine


class BaselineSubject:
    """The official step with its batches."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.config = make_config("official-v1", args)
        before = torch.cuda.memory_allocated() if args.device.type == "cuda" else 0
        engine = make_engine(self.config, args.device)
        engine.step_in_stage = STEPS_PER_EPOCH  # scalars of a step in which every term counts
        self.scalars, noise = engine.scalars(), Noise(self.config.seed, args.device)
        self.baseline = eager_baseline.Baseline(self.config, engine.nets, noise, name)
        self.batches = itertools.cycle(make_batches(self.config, args.device))
        del engine
        self.peak_mib = peak_mib(self.step, args.device, before)

    def step(self) -> None:
        self.losses = self.baseline.step(next(self.batches), self.scalars)


class Subject:
    """One preset's engine with its clock, batches and counts; `plain`: with the ops' plain-torch references."""

    def __init__(self, preset: str, args: argparse.Namespace, plain: bool = False) -> None:
        self.preset, self.plain = preset, plain
        self.config = make_config(preset, args)
        self.executed, self.necessary = flops.count_step(self.config), flops.count_necessary(self.config)
        before = torch.cuda.memory_allocated() if args.device.type == "cuda" else 0
        self.engine = make_engine(self.config, args.device)
        self.clock = PhaseClock(self.engine, args.device)
        self.batches = itertools.cycle(make_batches(self.config, args.device))
        self.peak_mib = peak_mib(self.step, args.device, before)

    def step(self) -> None:
        with reference_only() if self.plain else nullcontext():
            self.clock.step(next(self.batches))


def peak_mib(step: timing.Fn, device: torch.device, before: int) -> float:
    """MiB at the peak of two first steps: on a GPU what this subject allocates, on a CPU the process's so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second has the optimisers' state
        step()
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def baseline_row(name: str, subject: BaselineSubject, t: timing.Times, ceiling: float) -> timing.Row:
    """One line of the table, of the official step; its phases are not timed apart."""
    necessary = flops.total(flops.count_necessary(subject.config)) / 1e12
    return {
        "preset": "official code", "engine": name, "dtype": "fp32", **t.row(),
        **shared_columns(subject, t, necessary, ceiling), **subject.losses,
    }  # fmt: skip


def shared_columns(subject: BaselineSubject | Subject, t: timing.Times, necessary: float, ceiling: float) -> timing.Row:
    """Rates of a step of `t`, memory."""
    seconds = t.median / 1e3
    return {
        "images_per_s": 2 * subject.config.schedule.batch_size / seconds, "peak_memory_mib": subject.peak_mib,
        "necessary_tflop": necessary, "necessary_tflop_per_s": necessary / seconds,
        "percent_of_matmul": 100 * necessary / seconds / ceiling, "matmul_tflop_per_s": ceiling,
    }  # fmt: skip


def row(subject: Subject, t: timing.Times, ceiling: float, rounds: int) -> timing.Row:
    """One line of the table."""
    losses: dict[str, Any] = {}
    try:
        losses = {name: value for name, value in subject.engine.stats.read().items() if name in ("C/loss", "D/loss")}
    except NonFiniteError as error:  # the time is worth nothing then, and the table says so
        losses = {"not finite": str(error)}
    executed, necessary = flops.total(subject.executed) / 1e12, flops.total(subject.necessary) / 1e12
    phases = {f"{name}_ms": p.median for name, p in subject.clock.times(rounds).items()}
    return {
        "preset": subject.preset, "engine": "ours, eager" + ", plain ops" * subject.plain, "dtype": "fp32",
        **t.row(), **phases,
        **shared_columns(subject, t, necessary, ceiling), "executed_tflop": executed, **losses,
    }  # fmt: skip


def profile_summary(subject: Subject, t: timing.Times, device: torch.device) -> dict[str, Any]:
    """One profiled step: milliseconds per class of kernel, kernels launched, the longest kernels."""
    ran = profiling.kernels({"step": subject.step}, device)["step"]
    total = sum(ms for _, ms in ran)
    longest = sorted(profiling.by_name(ran).items(), key=lambda item: -item[1])[:15]
    return {
        "kernels" if device.type == "cuda" else "operators": len(ran),
        "kernel_ms": total,
        "percent_of_median_step": 100 * total / t.median,
        "ms_by_class": profiling.by_class(ran),
        "longest_ms": dict(longest),
    }


def arguments() -> argparse.Namespace:
    p = timing.parser(__doc__, "step", rounds=10, warmup=2)
    p.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    p.add_argument("--baseline", nargs="*", choices=eager_baseline.BASELINES, help="default: all; on a CPU eager alone")
    p.add_argument("--plain-ops", action="store_true", help="ours once more, every op as its plain-torch reference")
    p.add_argument("--dataset", choices=sorted(flops.NUM_CLASSES), default="cifar10", help="its preset and classes")
    p.add_argument("--depth", type=int, help="of C (default 28; --tiny: 10)")
    p.add_argument("--width", type=int, help="of C (default 10; --tiny: 1)")
    p.add_argument("--gan-width", type=int, help="channels of G and D (default 256; --tiny: 16)")
    p.add_argument("--batch-size", type=int, help="labelled images, and as many unlabelled (default 256; --tiny: 8)")
    p.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN choose by trials; the engine does not")
    p.add_argument("--profile", action="store_true", help="add one profiled step per preset, after the clock")
    args = timing.parse(p)
    if args.baseline is None:
        args.baseline = list(eager_baseline.BASELINES) if args.device.type == "cuda" else ["eager"]
    sizes = {"depth": (28, 10), "width": (10, 1), "gan_width": (256, 16), "batch_size": (256, 8)}
    for name, (full, tiny) in sizes.items():
        if getattr(args, name) is None:
            setattr(args, name, tiny if args.tiny else full)
    return args


def main() -> None:
    args = arguments()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch.manual_seed(0)
    baselines = {name: BaselineSubject(name, args) for name in args.baseline}
    subjects = {preset: Subject(preset, args) for preset in args.preset}
    if args.plain_ops:
        subjects |= {f"{preset}, plain ops": Subject(preset, args, plain=True) for preset in args.preset}
    product, product_flops, product_name = ceilings.matmul(args.device, args.tiny)
    fns = {name: subject.step for name, subject in (baselines | subjects).items()}
    times = timing.measure({**fns, "matmul": product}, args.rounds, args.warmup, args.device)
    ceiling = product_flops / times["matmul"].median / 1e9
    rows = [baseline_row(name, subject, times[name], ceiling) for name, subject in baselines.items()]
    rows += [row(subject, times[name], ceiling, args.rounds) for name, subject in subjects.items()]
    for line, name in zip(rows, (*baselines, *subjects), strict=True):
        line |= {f"speedup_over_{base}": times[base].median / times[name].median for base in baselines}
    notes = [
        "fp32 (on a GPU: convolutions in TF32, torch's default). verbatim, eager: the official step, with and without "
        "torch.cuda.empty_cache(); ours is the EAGER engine: the compiled and captured step is not here yet.",
        "The speed-up of `official-v1` compares equal computations; `paper` saves a forward of C and the class loop.",
        f"C = WRN-{args.depth}-{args.width}, G and D {args.gan_width} wide, batch {args.batch_size} labelled + "
        f"{args.batch_size} unlabelled, {args.dataset}; synthetic resident images, loading outside the clock.",
        "images/s = labelled + unlabelled images of the C update, per second of step.",
        "TFLOP: convolutions and matrix products, 2 per multiply-add, counted on the meta device (flops.py). executed: "
        "what this engine runs; necessary: the same semantics with the fewest FLOPs (performance.md 1.1). The preset "
        "`paper` saves one forward of C that `official-v1` makes.",
        f"percent_of_matmul: necessary TFLOP/s over the matmul's ({product_name}), interleaved with the steps.",
        "Peak memory: GPU, allocated by this engine; CPU, resident set of the process so far.",
    ]
    summary: dict[str, Any] = {
        f"tflop {name}": {
            f"{phase} {kind}": count / 1e12
            for phase, kinds in s.executed.items()
            for kind, count in kinds.items()
            if count
        }
        for name, s in subjects.items()
    }
    environment = timing.environment(args.device)
    timing.write_results(args.out, args.name, rows, environment, notes=notes, summary=summary)
    print("\n".join(timing.table(rows)), flush=True)
    if args.profile:
        for name, subject in subjects.items():
            summary[f"profile {name}"] = profile_summary(subject, times[name], args.device)
            timing.write_results(args.out, args.name, rows, environment, notes=notes, summary=summary)
            print(f"{name}: {timing.inline(summary[f'profile {name}'])}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
