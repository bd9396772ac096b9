"""Every op of puat_fast.ops against plain torch and against what torch.compile makes of the same reference.

The cases stand in op_cases/, a module per op; a case is one shape, dtype and layout, forward or forward + backward.
Candidates, interleaved: `reference` (eager), `compiled` (torch.compile of the reference), `ours`, `ours in place`
where the op has such a form, `copy` (as many bytes as the op must move), and on a GPU the first three replayed from a
captured graph. An op that loses to `compiled` is reported as losing, and goes.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import ceilings
import timing
import torch
from op_cases import Case, runnable, tensors

KEYS = """\
op, what, shape, dtype, layout, candidate
gb_per_s            the fewest bytes that the op must move, over the median; of which a large copy and one of as many
                    bytes make percent_of_large_copy, percent_of_same_size_copy
max_abs_diff        largest difference to the reference's results
verdict             of ours, against the faster of reference and compiled"""
RIVALS = ("reference", "compiled")
OPS = sorted(path.stem for path in (Path(__file__).parent / "op_cases").glob("[!_]*.py"))


def candidates(case: Case, args: argparse.Namespace) -> dict[str, timing.Fn]:
    """Name -> function. `ours` stands last among the eager ones: a tie is not due to a warmer cache than theirs."""
    fns: dict[str, timing.Fn] = {"reference": runnable(case, case.reference)}
    if not args.no_compile:
        torch._dynamo.reset()  # each case its own code, not a recompilation with dynamic shapes
        fns["compiled"] = runnable(case, torch.compile(case.reference, fullgraph=True, dynamic=False))
    fns["ours"] = runnable(case, case.ours)
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
    off = {name: max_abs_diff(fns[name](), fns["reference"]()) for name in (*RIVALS, "ours") if name in fns}
    times = timing.measure(fns, args.rounds, args.warmup, args.device, flush_l2=not args.no_flush)
    said = {"ours": verdict(times, ""), "ours graph": verdict(times, " graph")}
    rows = []
    for name, t in times.items():
        rate = case.bytes_moved / t.median / 1e6
        rows.append({
            "op": case.op, "what": case.what, "shape": "x".join(map(str, case.shape)),
            "dtype": str(case.dtype).removeprefix("torch."), "layout": case.layout, "candidate": name, **t.row(),
            "gb_per_s": rate,
            "percent_of_large_copy": 100 * rate / copy_rate,
            "percent_of_same_size_copy": 100 * times["copy"].median / t.median,
            "max_abs_diff": off.get(name), "verdict": said.get(name),
        })  # fmt: skip
    return rows


def max_abs_diff(actual: object, expected: object) -> float:
    """The largest difference between any two elements of the results."""
    pairs = zip(tensors(actual), tensors(expected), strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel()), default=0.0)


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


def write(args: argparse.Namespace, rows: list[timing.Row], notes: list[str], summary: timing.Row) -> None:
    """What there is so far."""
    env = timing.environment(args.device)
    timing.write_results(args.out, args.name, rows, env, notes=notes, summary=summary, copy=args.json)


def main() -> None:
    parser = timing.parser(__doc__, "ops", rounds=100, warmup=10, keys=KEYS)
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS)
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
    size = "tiny" if args.tiny else "gpu" if device.type == "cuda" else "cpu"
    rows: list[timing.Row] = []
    for op in args.op:
        module = importlib.import_module(f"op_cases.{op}")
        if device.type == "cpu" and hasattr(module, "NO_CPU_KERNEL"):
            notes.append(f"{op}: the reference serves the CPU: {module.NO_CPU_KERNEL}")
            write(args, rows, notes, summary)
            continue
        for case in module.cases(size, device):
            rows += bench(case, args, copy_rate)
            write(args, rows, notes, summary)
            print(f"{op} {case.what} {case.shape} {case.dtype} {case.layout}", file=sys.stderr, flush=True)
    short = ("op", "what", "shape", "dtype", "layout", "candidate", "median_ms", "gb_per_s", "verdict")
    print("\n".join(timing.table([{key: row[key] for key in short} for row in rows if row["verdict"]])))


if __name__ == "__main__":
    main()
