"""The PUAT step: the official code's (eager_baseline.py) and ours, ms per step and phase, images/s, memory, TFLOP/s.

All are interleaved step by step in one process, on resident images; loading is outside the clock. `verbatim` is the
official step as published, `eager` the same without torch.cuda.empty_cache() (on a CPU the two are one, and only
`eager` is run). Ours: `eager` and `compiled` at each preset. The speed-up to quote is that of `official-v1`, which
computes what the baselines compute. --leave-one-out times the compiled engine once more without each of its short cuts.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from dataclasses import fields
from typing import Any

import ceilings
import eager_baseline
import flops
import profiling
import step_report
import timing
import torch
from step_subjects import BaselineSubject, EngineSubject, Losses, Subject, make_batches, make_config

from puat_fast.config import ConfigError, FastConfig
from puat_fast.engine import precision

PRESETS = ("official-v1", "paper")
SHORT_CUTS = tuple(f.name for f in fields(FastConfig) if f.name != "graph")  # without it: the rows "graph off"
GRAPHS = 4096
"""Graphs that one function may have here, in all engines together; torch's own limit is for one engine."""


class Bench:
    """The subjects so far, timed together, and the files that tell of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, args.device
        config = make_config(args, args.preset[0], "eager")
        self.batches = make_batches(config, self.device)
        self.product, self.product_flops, product_name = ceilings.matmul(self.device, args.tiny)
        self.subjects: list[Subject] = []
        self.references: dict[str, Losses] = {}  # by preset: of our eager fp32 engine
        self.rows: list[timing.Row] = []
        self.left_out: list[timing.Row] = []
        C, B = config.classifier, config.schedule.batch_size
        self.sizes = (
            f"C = WRN-{C.depth}-{C.width}, G and D {config.gan.width} wide, batch {B} labelled + {B} unlabelled, "
            f"{config.dataset}"
        )
        random = config.dataset != "digits" and config.data_dir is None
        self.notes = [
            f"{self.sizes}{', random images' if random else ''}; resident images, loading outside the clock.",
            "official code, verbatim and eager: with and without torch.cuda.empty_cache(); on a GPU its convolutions "
            "work in TF32, torch's default. The speed-up of `official-v1` compares equal computations; `paper` saves a "
            "forward of C and the class loop.",
            "first_loss_diff, max_loss_diff: largest relative difference of any loss to the preset's eager fp32 engine "
            "in the first step from equal weights and draws, and in all first steps; of the official code one D loss a "
            "step.",
            "Phases of a captured step cannot be seen from outside: `graph off` is the same engine, not captured.",
            "TFLOP: convolutions and matrix products, 2 per multiply-add, counted on the meta device (flops.py). "
            "executed: what this engine runs; necessary: with every exact short cut (performance.md 1.1), which is "
            f"what tflop_per_s counts; percent_of_matmul: of that of {product_name}, interleaved with the steps.",
            "peak_mib: GPU, allocated by this subject; CPU, resident set of the process so far. launches: GPU, kernels "
            "of a step; CPU, operators. compile_s: the first steps less as many steady ones.",
        ]

    # -- subjects ---------------------------------------------------------------------------------------------------

    def baselines(self) -> None:
        """The official code's steps."""
        for name in self.args.baseline:
            self._add(BaselineSubject(name, make_config(self.args, "official-v1", "eager"), self.batches, self.device))

    def engine(self, preset: str, kind: str, asked: str, plain: bool = False) -> None:
        """One of our engines; where its steps are captured, also as it is without."""
        label = f"{preset} {kind}" + (f" {asked}" if len(self.args.precision) > 1 else "") + ", plain ops" * plain
        config = make_config(self.args, preset, kind, asked)
        subject = EngineSubject(label, config, self.batches, self.device, plain=plain)
        self._add(subject)
        if subject.captured:
            self._add(subject.without_graph())

    def _add(self, subject: Subject) -> None:
        self.subjects.append(subject)
        print(f"ready: {subject.name}", file=sys.stderr, flush=True)

    def reference(self, preset: str) -> None:
        """The losses that the preset's others are held against: a subject's, or those of an engine made for it."""
        config = make_config(self.args, preset, "eager", "fp32")
        for s in self.subjects:
            if isinstance(s, EngineSubject) and (s.config.preset, s.kind, s.precision) == (preset, "eager", "fp32"):
                self.references[preset] = s.losses
                return
        self.references[preset] = EngineSubject("reference", config, self.batches, self.device).losses
        self._forget()

    def _forget(self) -> None:
        """Give back the memory of subjects that are gone."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- measuring --------------------------------------------------------------------------------------------------

    def measure(self, rounds: int, warmup: int) -> None:
        """Time all subjects, interleaved, and write what is known."""
        times, ceiling = self._times(self.subjects, rounds, warmup)
        self.rows = [step_report.row(s, times, ceiling, self.references, rounds) for s in self.subjects]
        self.write()

    def _times(self, subjects: list[Subject], rounds: int, warmup: int) -> tuple[dict[str, timing.Times], float]:
        """(times by name, TFLOP/s of the matmul in the same rounds)."""
        fns = {s.name: s.step for s in subjects} | {"matmul": self.product}
        before: dict[str, timing.Fn] = {}
        if self.device.type == "cuda" and any(s.kind == "verbatim" for s in subjects):
            # It empties the allocator's cache: of all that the others keep there, before its clock, and they have
            # theirs again, before their clocks. A captured step has memory of its own.
            before = {s.name: s.settle for s in subjects if not s.captured}
            before |= {s.name: torch.cuda.empty_cache for s in subjects if s.kind == "verbatim"}
        times = timing.measure(fns, rounds, warmup, self.device, before=before)
        return times, self.product_flops / times["matmul"].median / 1e9

    def leave_out(self, full: EngineSubject, short_cut: str) -> None:
        """The engine without one short cut, interleaved with the full one, and then forgotten."""
        c = full.config
        config = make_config(self.args, c.preset, c.engine, c.precision, off=short_cut)
        name = f"{full.name}, no {short_cut}"
        subject = EngineSubject(name, config, self.batches, self.device, off=short_cut)
        times, ceiling = self._times([full, subject], self.args.rounds, self.args.warmup)
        row = step_report.row(subject, times, ceiling, self.references, self.args.rounds)
        full_ms = times[full.name].median
        self.left_out.append(row | {"full_ms": full_ms, "slowdown": times[name].median / full_ms})
        self.write()
        del subject
        self._forget()

    def profile(self) -> None:
        """Count every subject's launches in one step; with --profile, tell where its time goes."""
        for subject, row in zip(self.subjects, self.rows, strict=True):
            ran = profiling.kernels({"step": subject.step}, self.device)["step"]
            row["launches"] = len(ran)
            if self.args.profile:
                row["profile"] = profile_summary(ran, row["median_ms"])
            self.write()

    def write(self) -> None:
        """All files, with what there is so far."""
        args, rows = self.args, [*self.rows, *self.left_out]
        timing.write_results(
            args.out, args.name, rows, timing.environment(self.device), notes=self.notes,
            tables=step_report.tables(rows), copy=args.json,
        )  # fmt: skip
        step_report.chart(args.out / f"{args.name}.png", rows, self.sizes)


def profile_summary(ran: profiling.Kernels, median_ms: float) -> dict[str, Any]:
    """One profiled step: milliseconds per class of kernel, the longest kernels."""
    total = sum(ms for _, ms in ran)
    longest = sorted(profiling.by_name(ran).items(), key=lambda item: -item[1])[:15]
    return {"kernel_ms": total, "percent_of_median_step": 100 * total / median_ms,
            "ms_by_class": profiling.by_class(ran), "longest_ms": dict(longest)}  # fmt: skip


def arguments() -> argparse.Namespace:
    p = timing.parser(__doc__, "step", rounds=10, warmup=2, keys=step_report.KEYS)
    p.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS))
    p.add_argument("--engine", nargs="*", choices=("eager", "compiled"), default=["eager", "compiled"])
    p.add_argument("--precision", nargs="+", choices=("auto", "bf16", "tf32", "fp32"), default=["auto"],
                   help="of our engines, one or several; auto: bf16 on a GPU, else fp32")  # fmt: skip
    p.add_argument("--baseline", nargs="*", choices=eager_baseline.BASELINES, help="default: all; on a CPU eager alone")
    p.add_argument("--leave-one-out", nargs="*", choices=SHORT_CUTS, metavar="SHORT_CUT",
                   help=f"time `compiled` without each (default: all) of {', '.join(SHORT_CUTS)}; slow: each "
                   "compiles anew")  # fmt: skip
    p.add_argument("--no-compile", action="store_true", help="`compiled` without torch.compile: its other short cuts")
    p.add_argument("--plain-ops", action="store_true", help="`eager` once more, every op as its plain-torch reference")
    p.add_argument("--dataset", choices=sorted(flops.NUM_CLASSES), help="its preset; default: cifar10, on a CPU digits")
    p.add_argument("--data-dir", help="folder of the dataset's files; default: random images (digits: its own)")
    p.add_argument("--depth", type=int, help="of C (default: the preset's, of cifar10 28; --tiny: 10)")
    p.add_argument("--width", type=int, help="of C (default: the preset's, of cifar10 10; --tiny: 1)")
    p.add_argument("--gan-width", type=int, help="channels of G and D (default: the preset's, 256; --tiny: 16)")
    p.add_argument("--batch-size", type=int, help="labelled images, and as many unlabelled (preset: 256; --tiny: 8)")
    p.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN choose by trials; the engine does not")
    p.add_argument("--profile", action="store_true", help="tell which kernels a step's time goes to, after the clock")
    args = timing.parse(p)
    on_gpu = args.device.type == "cuda"
    if args.baseline is None:
        args.baseline = list(eager_baseline.BASELINES) if on_gpu else ["eager"]
    args.dataset = args.dataset or ("cifar10" if on_gpu else "digits")
    if args.tiny:
        for name, size in {"depth": 10, "width": 1, "gan_width": 16, "batch_size": 8}.items():
            if getattr(args, name) is None:
                setattr(args, name, size)
    left_out = args.leave_one_out
    args.leave_one_out = () if left_out is None else left_out or SHORT_CUTS
    if args.leave_one_out and "compiled" not in args.engine:
        p.error("--leave-one-out: leaves short cuts out of --engine compiled, which is not asked for")
    if not (args.baseline or args.engine):
        p.error("--baseline, --engine: nothing to time")
    try:
        # auto and what it stands for are one: the first that was named
        named = reversed(args.precision)
        args.precision = list({precision.name(name, args.device): name for name in named}.values())[::-1]
        make_config(args, args.preset[0], "eager")
    except ConfigError as error:
        p.error(str(error))
    return args


def main() -> None:
    args = arguments()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPHS
    torch.manual_seed(0)
    bench = Bench(args)
    bench.baselines()
    ours = list(itertools.product(args.preset, args.precision))
    for preset, asked in ours if "eager" in args.engine else []:
        bench.engine(preset, "eager", asked)
        if args.plain_ops:
            bench.engine(preset, "eager", asked, plain=True)
    for preset, asked in ours if "compiled" in args.engine else []:
        if bench.subjects:
            bench.measure(1, 0)  # compiling may outlast a time limit: the rows so far, in one round
        bench.engine(preset, "compiled", asked)
    for preset in args.preset if args.engine else []:
        bench.reference(preset)
    bench.measure(args.rounds, args.warmup)
    bench.profile()
    for subject in list(bench.subjects):
        if isinstance(subject, EngineSubject) and subject.kind == "compiled" and not subject.is_twin:
            for short_cut in args.leave_one_out:
                bench.leave_out(subject, short_cut)
    for title, rows in reversed(step_report.tables([*bench.rows, *bench.left_out]).items()):  # the answer comes last
        print(f"\n{title}\n\n" + "\n".join(timing.table(rows)), flush=True)


if __name__ == "__main__":
    main()
