"""What bench_step.py times: the official code's step, and our engines' by preset, precision and short cuts.

All subjects of a preset start from equal weights and draws and see the same batches, so that their losses can be
compared before the clock starts.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import eager_baseline
import flops
import numpy as np
import timing
import torch
from torch import Tensor

from puat_fast.config import Config
from puat_fast.data import load_dataset, split_indices
from puat_fast.data.batch import StepBatch
from puat_fast.data.loaders.resident import ResidentLoader
from puat_fast.data.sampler import SemiSupervisedSampler
from puat_fast.engine import precision
from puat_fast.engine.capture import WARMUP
from puat_fast.engine.step import Engine
from puat_fast.methods import Phase
from puat_fast.networks import Networks
from puat_fast.noise import Noise
from puat_fast.ops import reference_only

PHASES = ("D", "G", "A", "C", "rest")
FIRST_STEPS = WARMUP + 1  # in the last of them a step is captured, and replayed for the first time
SMALL_LOSS = 0.01  # below it a loss's difference counts as absolute, over this

Losses = list[dict[str, list[float]]]
"""Of every step: name -> values, one per update; accuracies and means of D's outputs are no losses."""


def make_config(args: argparse.Namespace, preset: str, engine: str, precision: str = "auto", off: str = "") -> Config:
    """The preset, with the sizes that the command line gives; off: a field of `fast` that is to be false."""
    sizes = {"classifier.depth": args.depth, "classifier.width": args.width, "gan.width": args.gan_width,
             "schedule.batch_size": args.batch_size}  # fmt: skip
    given: dict[str, Any] = {key: size for key, size in sizes.items() if size is not None}
    without = {name: False for name in (off, "compile" if args.no_compile else "") if name}
    return Config.preset(
        preset, dataset=args.dataset, data_dir=args.data_dir, engine=engine, precision=precision, fast=without, **given
    )


def make_batches(config: Config, device: torch.device, count: int = 2) -> list[StepBatch]:
    """StepBatches gathered by the resident loader: of the dataset's images where they are at hand, else random ones."""
    B = config.schedule.batch_size
    if config.dataset == "digits" or config.data_dir is not None:
        train = (data := load_dataset(config.dataset, config.data_dir, config.data.classes)).train
        images, labels, c = train.images, train.labels, config.data
        split = split_indices(labels, data.num_classes, c.n_labelled, config.seed, c.val_fraction)
        sampler = SemiSupervisedSampler(split.labelled, split.unlabelled, B, config.seed)
    else:
        n, rng = max(512, 2 * B), np.random.default_rng(0)
        labels = rng.integers(0, flops.NUM_CLASSES[config.dataset], n)
        images = rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        sampler = SemiSupervisedSampler(np.arange(n // 2), np.arange(n // 2, n), B, seed=0)
    loader = ResidentLoader(images, labels, sampler, device)
    return [loader.next_step(config.schedule.n_disc) for _ in range(count)]


def make_engine(config: Config, device: torch.device) -> Engine:
    """An engine in stage 2, with fresh networks."""
    noise = Noise(config.seed, device)
    nets = Networks.build(config, flops.NUM_CLASSES[config.dataset], noise)
    engine = Engine(config, nets, noise, flops.STEPS_PER_EPOCH)
    if engine.stage == 1:
        engine.begin_stage2()
    return engine


class Subject:
    """A step to be timed, its config, and what its first steps showed."""

    kind = "engine"
    captured = False  # the whole step as one CUDA graph
    precision: str

    def __init__(self, name: str, config: Config, batches: Sequence[StepBatch], device: torch.device) -> None:
        self.name, self.config, self.device = name, config, device
        self.batches = itertools.cycle(batches)
        self.losses: Losses = []
        self.first_seconds: float | None = None
        self.peak_mib: float | None = None
        self._allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0

    def step(self) -> None:
        """One step."""
        raise NotImplementedError

    def settle(self) -> None:
        """A step that no clock sees."""
        self.step()

    def last_losses(self) -> dict[str, list[float]]:
        """Losses of the latest step."""
        raise NotImplementedError

    def begin(self, steps: int) -> None:
        """The first steps, outside the clock: memory is taken, and code compiled and captured where that is asked for.

        Keeps their losses, their seconds, and the peak memory: on a GPU what this subject allocates, on a CPU the
        process's resident set so far.
        """
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
            self.losses.append(self.last_losses())
        if on_gpu:
            torch.cuda.synchronize(self.device)
        self.first_seconds = time.perf_counter() - start
        if on_gpu:
            self.peak_mib = (torch.cuda.max_memory_allocated(self.device) - self._allocated) / 2**20
        else:
            self.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def phases(self, last: int) -> dict[str, float]:
        """Median milliseconds of each phase over the last steps, where phases are timed."""
        return {}

    @cached_property
    def necessary(self) -> float:
        """TFLOP of a step with its semantics and every exact short cut."""
        return flops.total(flops.count_necessary(self.config)) / 1e12


class BaselineSubject(Subject):
    """The official code's step, on a GPU in torch's default precision: convolutions in TF32."""

    def __init__(self, name: str, config: Config, batches: Sequence[StepBatch], device: torch.device) -> None:
        super().__init__(f"official code, {name}", config, batches, device)
        self.kind, self.precision = name, "tf32" if device.type == "cuda" else "fp32"
        noise = Noise(config.seed, device)
        nets = Networks.build(config, flops.NUM_CLASSES[config.dataset], noise)
        self.baseline = eager_baseline.Baseline(config, nets, noise, name)
        del nets  # it has its own
        self.schedule = flops.meta_engine(config)  # for its scalars: those that our engines see
        self.begin(2)  # the second has the optimisers' state

    def step(self) -> None:
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
        self._values = self.baseline.step(next(self.batches), self.schedule.scalars())
        self.schedule.step_in_stage = _next_step(self.schedule)

    def last_losses(self) -> dict[str, list[float]]:
        return {name: [value] for name, value in self._values.items()}


class EngineSubject(Subject):
    """One of our engines. plain: with the ops' plain-torch references; off: the short cut that it does without."""

    clock: PhaseClock | None = None
    is_twin = False  # of a captured subject

    def __init__(
        self,
        name: str,
        config: Config,
        batches: Sequence[StepBatch],
        device: torch.device,
        *,
        plain: bool = False,
        off: str = "",
    ) -> None:
        super().__init__(name, config, batches, device)
        self.kind, self.precision = config.engine, precision.name(config.precision, device)
        self.plain, self.off = plain, off
        before = compiled_graphs()
        self.engine = make_engine(config, device)
        self.engine.on_step = self._keep
        self.captured = self.engine.graphs is not None
        self.begin(FIRST_STEPS)
        self.captured = self.engine.graphs is not None  # it may have turned out that it cannot be
        self.graphs = {name: n - before[name] for name, n in compiled_graphs().items()}
        if not self.captured:
            self.clock = PhaseClock(self.engine, device)

    def without_graph(self) -> EngineSubject:
        """The same engine, steps not captured: a captured step's phases cannot be seen from outside."""
        twin = copy.copy(self)
        twin.is_twin = True
        twin.name, twin.captured, twin.clock = f"{self.name}, graph off", False, PhaseClock(self.engine, self.device)
        twin.losses, twin.first_seconds, twin.peak_mib, twin.graphs = [], None, None, {}
        return twin

    def step(self) -> None:
        timed = nullcontext() if self.clock is None else self.clock.step()
        graphs = self.engine.graphs
        if not self.captured:
            self.engine.graphs = None
        with timed, reference_only() if self.plain else nullcontext():
            self.engine.step(next(self.batches))
        if not self.captured:
            self.engine.graphs = graphs
        self.engine.step_in_stage = _next_step(self.engine, done=0)

    def settle(self) -> None:
        self.step()
        if self.clock is not None:
            self.clock.steps.pop()

    def _keep(self, terms: dict[str, list[Tensor]]) -> None:
        self._terms = terms

    def last_losses(self) -> dict[str, list[float]]:
        of_d = {"D/real", "D/fake_g", "D/fake_c"}
        names = [name for name in self._terms if name not in of_d and not name.endswith("_acc")]
        return {name: [float(value) for value in self._terms[name]] for name in names}

    def phases(self, last: int) -> dict[str, float]:
        return {} if self.clock is None else self.clock.medians(last)

    @cached_property
    def executed(self) -> float:
        """TFLOP of a step as this engine runs it."""
        return flops.total(flops.count_step(self.config)) / 1e12


def _next_step(engine: Engine, done: int = 1) -> int:
    """Steps done, but never past the first epoch: the next one may have phases of another kind."""
    return min(engine.step_in_stage + done, flops.STEPS_PER_EPOCH - 1)


def compiled_graphs() -> dict[str, int]:
    """How many graphs torch.compile has compiled in this process, and how many it took from its cache on disk."""
    counted = torch._dynamo.utils.counters["aot_autograd"]
    return {"compiled": counted["autograd_cache_miss"] + counted["autograd_cache_bypass"],
            "from cache": counted["autograd_cache_hit"]}  # fmt: skip


class PhaseClock:
    """Times of the phases of an engine's steps, taken from outside: it replaces `engine._update` for a step.

    The teacher follows in C's; `rest` is what comes after the last update. On a GPU the marks are CUDA events, read
    at the end.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine, self.on_gpu = engine, device.type == "cuda"
        self.steps: list[list[tuple[str, Any]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, one step of the engine."""
        update = self.engine._update

        def timed(phase: Phase, *args: Any) -> None:
            update(phase, *args)
            self._mark(phase.net)

        self.steps.append([])
        self.engine._update = timed  # type: ignore[method-assign]
        self._mark("start")
        yield
        self._mark("rest")
        del self.engine._update  # the class's own is seen again

    def _mark(self, name: str) -> None:
        now: Any = time.perf_counter()
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.steps[-1].append((name, now))

    def medians(self, last: int) -> dict[str, float]:
        """Milliseconds per phase (the D updates of a step together), over the last steps."""
        samples: dict[str, list[float]] = {}
        for marks in self.steps[-last:]:
            spent: dict[str, float] = {}
            for (_, a), (name, b) in itertools.pairwise(marks):
                spent[name] = spent.get(name, 0.0) + (a.elapsed_time(b) if self.on_gpu else (b - a) * 1e3)
            for name, ms in spent.items():
                samples.setdefault(name, []).append(ms)
        return {name: timing.Times.of(samples[name]).median for name in PHASES if name in samples}


def max_loss_diff(ours: Losses, reference: Losses) -> float | None:
    """The largest |a - b| / max(|b|, 0.01) of any loss, over the steps that both have; None if it is not finite.

    Of a D update whose value one of them does not tell, the last ones are compared.
    """
    diffs = [0.0]
    for a_step, b_step in zip(ours, reference, strict=False):
        for name in a_step.keys() & b_step.keys():
            for a, b in zip(reversed(a_step[name]), reversed(b_step[name]), strict=False):
                diffs.append(abs(a - b) / max(abs(b), SMALL_LOSS))
    return max(diffs) if all(map(math.isfinite, diffs)) else None
