"""Convolutions of PUAT's networks as cuDNN runs them: shape x {fprop, dgrad, wgrad} x precision and layout x batch.

C's three shapes make up 94 % of its FLOPs; D's are its 3x3 convolution and average pool as one 4x4 stride-2
convolution; G's its 3x3 convolutions. Each row: TFLOP/s, percent of the bf16 matmul rate measured among the same
candidates, the main kernel (its name shows the tile) and its share of the call (the rest: layout changes, casts).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import ceilings
import profiling
import timing
import torch

KEYS = """\
shape, batch, precision, direction
tflops              2 per multiply-add, over the median
matmul_tflops       of the matmul interleaved with the row; percent_of_matmul: tflops over it
kernel              the longest one, kernel_share: its part of the call's kernel time; kernels: how many ran"""
DIRECTIONS = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True)
class Shape:
    """A square convolution with padding 1, of network `net`, on size x size inputs."""

    net: str
    channels: int
    size: int
    kernel: int = 3
    stride: int = 1

    def __str__(self) -> str:
        c, out = self.channels, self.out_size
        return f"{self.net} {c}->{c} {self.kernel}x{self.kernel}/{self.stride} @{self.size}->{out}"

    @property
    def out_size(self) -> int:
        return (self.size + 2 - self.kernel) // self.stride + 1

    def flops(self, batch: int) -> float:
        """2 per multiply-add; the same for fprop, dgrad and wgrad."""
        return 2.0 * batch * (self.channels * self.kernel * self.out_size) ** 2


SHAPES = (
    Shape("C", 160, 32), Shape("C", 320, 16), Shape("C", 640, 8),
    *(Shape("D", 256, size, kernel=4, stride=2) for size in (32, 16, 8, 4)),
    *(Shape("G", 256, size) for size in (32, 16, 8)),
)  # fmt: skip
TINY_SHAPES = (Shape("C", 16, 8), Shape("D", 8, 8, kernel=4, stride=2))

# name -> dtype, memory format. float32 on a GPU means TF32 here: see main.
GPU_PRECISIONS = {
    "bf16 NHWC": (torch.bfloat16, torch.channels_last),
    "tf32 NHWC": (torch.float32, torch.channels_last),
    "tf32 NCHW": (torch.float32, torch.contiguous_format),
}
CPU_PRECISIONS = {
    "fp32 NHWC": (torch.float32, torch.channels_last),
    "fp32 NCHW": (torch.float32, torch.contiguous_format),
}


def candidates(shape: Shape, batch: int, dtype: Any, layout: Any, device: torch.device) -> dict[str, timing.Fn]:
    """fprop, dgrad and wgrad of one shape, on random data."""

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype).to(memory_format=layout)

    c, k, s = shape.channels, shape.kernel, [shape.stride] * 2
    x, w = random(batch, c, shape.size, shape.size), random(c, c, k, k)
    dy = random(batch, c, shape.out_size, shape.out_size)

    def backward(*mask: bool) -> timing.Fn:
        return lambda: torch.ops.aten.convolution_backward(
            dy, x, w, None, s, [1, 1], [1, 1], False, [0, 0], 1, [*mask, False]
        )

    forward = lambda: torch.nn.functional.conv2d(x, w, stride=shape.stride, padding=1)  # noqa: E731
    return {"fprop": forward, "dgrad": backward(True, False), "wgrad": backward(False, True)}


def bench(shape: Shape, batch: int, args: Any) -> list[timing.Row]:
    """Rows of one shape and batch; all its candidates and the matmul are interleaved."""
    device = args.device
    precisions = GPU_PRECISIONS if device.type == "cuda" else CPU_PRECISIONS
    fns = {
        f"{precision}/{direction}": fn
        for precision, (dtype, layout) in precisions.items()
        for direction, fn in candidates(shape, batch, dtype, layout, device).items()
    }
    product, product_flops, _ = ceilings.matmul(device, args.tiny)
    times = timing.measure({**fns, "matmul": product}, args.rounds, args.warmup, device)
    ceiling = product_flops / times["matmul"].median / 1e9
    ran = profiling.kernels(fns, device)
    rows = []
    for name in fns:
        precision, direction = name.split("/")
        tflops = shape.flops(batch) / times[name].median / 1e9
        kernel, share = profiling.longest(ran[name])
        rows.append({
            "shape": str(shape), "batch": batch, "precision": precision, "direction": direction,
            "tflops": tflops, "percent_of_matmul": 100 * tflops / ceiling, **times[name].row(),
            "matmul_tflops": ceiling, "kernel": kernel, "kernel_share": share, "kernels": len(ran[name]),
        })  # fmt: skip
    return rows


def best(rows: list[timing.Row]) -> list[timing.Row]:
    """The ten lines that decide the plan: per shape, percent of the matmul rate by precision and direction."""
    batch = min(row["batch"] for row in rows)
    short: dict[str, timing.Row] = {}
    for row in rows:
        if row["batch"] == batch:
            line = short.setdefault(row["shape"], {"shape": row["shape"], "batch": batch})
            line[f"{row['precision']} {row['direction']}"] = f"{row['tflops']:.3g} ({row['percent_of_matmul']:.0f} %)"
    return list(short.values())


def main() -> None:
    parser = timing.parser(__doc__, "conv", rounds=20, warmup=5, keys=KEYS)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 768])
    parser.add_argument("--no-cudnn-benchmark", action="store_true", help="cuDNN's heuristic picks, not its trials")
    args = timing.parse(parser)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = not args.no_cudnn_benchmark
    torch.manual_seed(0)
    shapes, batches = (TINY_SHAPES, [2, 4]) if args.tiny else (SHAPES, args.batch)
    notes = [
        "FLOPs count 2 per multiply-add of the convolution; percent is of the matmul "
        f"({ceilings.matmul(args.device, args.tiny)[2]}) interleaved with the row's candidates.",
        "kernel_share: part of the call's kernel time that the named kernel takes; kernels: how many ran.",
    ]
    rows: list[timing.Row] = []
    for batch in batches:  # outermost: a run that is cut short has every shape at the first batch size
        for shape in shapes:
            rows += bench(shape, batch, args)
            if shape is shapes[0]:  # once per batch size: asking the driver takes a while
                env = timing.environment(args.device)
            timing.write_results(args.out, args.name, rows, env, notes=notes, copy=args.json)
        print(f"batch {batch}: {len(rows)} rows", file=sys.stderr, flush=True)
    print("\n".join(timing.table(best(rows))))


if __name__ == "__main__":
    main()
