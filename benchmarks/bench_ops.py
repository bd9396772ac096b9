"""Every op of puat_fast.ops against plain torch and against what torch.compile makes of the same reference.

A case of an op is one shape, dtype and layout. Candidates, interleaved: `reference` (eager), `compiled`
(torch.compile of the reference), `ours`, `ours in place` where the op has such a form, `copy` (as many bytes as the
op must move), and on a GPU the same three replayed from a captured graph. An op that loses to `compiled` goes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ceilings
import timing
import torch
from torch import Tensor

Shape = tuple[int, ...]
RIVALS = ("reference", "compiled")


@dataclass(frozen=True)
class Case:
    """One op on one input. The functions take nothing and return the op's result."""

    op: str
    shape: Shape
    dtype: torch.dtype
    layout: str
    bytes_moved: int  # the fewest: each input read once, each output written once
    reference: Callable[..., Tensor]  # plain torch, of `inputs`
    inputs: tuple[object, ...]
    ours: timing.Fn
    ours_in_place: timing.Fn | None = None


def pgd_step_cases(shapes: Sequence[tuple[Shape, torch.dtype, str]], device: torch.device) -> Iterator[Case]:
    """pgd_step reads x, grad and x0 and writes x: four passes."""
    from puat_fast.ops import pgd_step, pgd_step_
    from puat_fast.ops.pgd_step import _reference  # impl="reference" copies once more, to fix the result's strides

    eps, step = 8 / 255, 2 / 255
    for shape, dtype, layout in shapes:
        x0 = torch.rand(shape, device=device)
        x, grad = (x0 + torch.empty_like(x0).uniform_(-eps, eps)).clamp(0, 1), torch.randn_like(x0)
        memory = torch.channels_last if layout == "NHWC" else torch.contiguous_format
        x, grad, x0 = (t.to(dtype).contiguous(memory_format=memory) for t in (x, grad, x0))
        own_x = x.clone()
        yield Case(
            "pgd_step", shape, dtype, layout, 4 * x.numel() * x.element_size(), _reference, (x, grad, x0, eps, step),
            ours=lambda x=x, g=grad, x0=x0: pgd_step(x, g, x0, eps, step),
            ours_in_place=lambda x=own_x, g=grad, x0=x0: pgd_step_(x, g, x0, eps, step),
        )  # fmt: skip


F32, BF16 = torch.float32, torch.bfloat16
BATCH = (256, 3, 32, 32)  # what one PGD step of training sees
OPS = {"pgd_step": pgd_step_cases}
TINY = [((8, 3, 32, 32), F32, "NCHW")]
CPU = [((1, 3, 32, 32), F32, "NCHW"), (BATCH, F32, "NCHW"), (BATCH, F32, "NHWC"), (BATCH, BF16, "NCHW"),
       ((512, 3, 32, 32), F32, "NCHW"), ((257, 3, 31, 33), F32, "NCHW"), ((4096, 3, 32, 32), F32, "NCHW")]  # fmt: skip
GPU = [*CPU, ((512, 3, 32, 32), BF16, "NHWC"), ((8192, 3, 32, 32), F32, "NCHW"), ((65536, 3, 32, 32), F32, "NCHW"),
       ((65536, 3, 32, 32), BF16, "NCHW")]  # fmt: skip


def candidates(case: Case, args: argparse.Namespace) -> dict[str, timing.Fn]:
    """Name -> function. `ours` stands last among the eager ones: a tie is not due to a warmer cache than theirs."""
    fns: dict[str, timing.Fn] = {"reference": lambda: case.reference(*case.inputs)}
    if not args.no_compile:
        torch._dynamo.reset()  # each case its own code, not a recompilation with dynamic shapes
        compiled = torch.compile(case.reference, fullgraph=True, dynamic=False)
        fns["compiled"] = lambda: compiled(*case.inputs)
    fns["ours"] = case.ours
    if args.device.type == "cuda" and not args.no_graph:
        fns |= {f"{name} graph": captured(fn) for name, fn in fns.items()}
    if case.ours_in_place is not None:
        fns["ours in place"] = case.ours_in_place
    fns["copy"] = ceilings.copy(args.device, case.bytes_moved)
    return fns


def captured(fn: timing.Fn) -> timing.Fn:
    """The function's replay as a CUDA graph: no host work but one launch."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm-up off the default stream, as capture requires
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def bench(case: Case, args: argparse.Namespace, copy_rate: float) -> list[timing.Row]:
    """Rows of one case."""
    fns = candidates(case, args)
    expected = case.reference(*case.inputs).double()
    off = {name: float((fns[name]().double() - expected).abs().max()) for name in (*RIVALS, "ours") if name in fns}
    times = timing.measure(fns, args.rounds, args.warmup, args.device, flush_l2=not args.no_flush)
    said = {"ours": verdict(times, ""), "ours graph": verdict(times, " graph")}
    rows = []
    for name, t in times.items():
        rate = case.bytes_moved / t.median / 1e6
        rows.append({
            "op": case.op, "shape": "x".join(map(str, case.shape)), "dtype": str(case.dtype).removeprefix("torch."),
            "layout": case.layout, "candidate": name, **t.row(), "gb_per_s": rate,
            "percent_of_large_copy": 100 * rate / copy_rate,
            "percent_of_same_size_copy": 100 * times["copy"].median / t.median,
            "max_abs_diff": off.get(name), "verdict": said.get(name),
        })  # fmt: skip
    return rows


def verdict(times: dict[str, timing.Times], suffix: str) -> str | None:
    """Ours against the fastest rival of its kind; a difference inside the rival's p10..p90 counts as none."""
    rivals = [name for name in times if name in {rival + suffix for rival in RIVALS}]
    if f"ours{suffix}" not in times or not rivals:
        return None
    ours, name = times[f"ours{suffix}"], min(rivals, key=lambda rival: times[rival].median)
    rival = times[name]
    ratio = rival.median / ours.median
    if rival.p10 <= ours.median <= rival.p90:
        return f"EVEN with {name} ({ratio:.2f}x)"
    return f"WINS {ratio:.2f}x over {name}" if ratio > 1 else f"LOSES to {name}: {1 / ratio:.2f}x its time"


def main() -> None:
    parser = timing.parser(__doc__, "ops", rounds=100, warmup=10)
    parser.add_argument("--op", choices=sorted(OPS), nargs="+", default=sorted(OPS))
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--no-graph", action="store_true", help="GPU: leave out the captured graphs")
    parser.add_argument("--no-flush", action="store_true", help="GPU: leave the L2 cache warm between calls")
    args = timing.parse(parser)
    torch.manual_seed(0)
    device = args.device
    moved = ceilings.large_copy_bytes(device, args.tiny)
    copied = timing.measure({"copy": ceilings.copy(device, moved)}, rounds=10, warmup=2, device=device)["copy"]
    copy_rate = moved / copied.median / 1e6
    summary = {"large_copy": {"bytes_moved": moved, "gb_per_s": copy_rate, **copied.row()}}
    notes = [
        "GB/s: the fewest bytes that the op must move, over the median; copies count bytes read and bytes written.",
        "Each candidate but `ours in place` and `copy` allocates its result, as the training loop has it.",
        "GPU: L2 flushed before each call, outside the clock, unless --no-flush. CPU: caches as the interleaved "
        "candidates leave them.",
        "verdict: ours against the faster of reference and compiled; EVEN: our median lies in its p10..p90.",
    ]
    shapes = TINY if args.tiny else GPU if device.type == "cuda" else CPU
    rows: list[timing.Row] = []
    for op in args.op:
        for case in OPS[op](shapes, device):
            rows += bench(case, args, copy_rate)
            env = timing.environment(device)
            timing.write_results(args.out, args.name, rows, env, notes=notes, summary=summary)
            print(f"{op} {case.shape} {case.dtype} {case.layout}", file=sys.stderr, flush=True)
    short = ("op", "shape", "dtype", "layout", "candidate", "median_ms", "gb_per_s", "verdict")
    print("\n".join(timing.table([{key: row[key] for key in short} for row in rows if row["verdict"]])))


if __name__ == "__main__":
    main()
