"""The two rates that a result is held against: a large matrix product and a large copy, on random data."""

from __future__ import annotations

import torch
from timing import Fn


def matmul(device: torch.device, tiny: bool) -> tuple[Fn, float, str]:
    """(function, FLOPs of one call, description): bf16 on a GPU, float32 on a CPU.

    Measured among the candidates, it sees the clocks that they see.
    """
    dtype, n = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    n = 256 if tiny else n
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3, f"{n} x {n} x {n} {_name(dtype)}"


def copy(device: torch.device, moved: int) -> Fn:
    """A function that moves `moved` bytes by one copy: half of them read, half written."""
    source = torch.randint(-128, 128, (max(moved // 2, 1),), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)  # written: its pages exist
    return lambda: target.copy_(source)


def large_copy_bytes(device: torch.device, tiny: bool) -> int:
    """Bytes moved by the copy that stands for the memory's rate: far more than the caches hold."""
    return 2**24 if tiny else 2**33 if device.type == "cuda" else 2**30


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
