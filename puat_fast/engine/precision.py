"""`precision`: what convolutions work in; weights, optimiser states, statistics, images and losses do not change.

| name | weights, states, losses, images | convolutions and activations |
|---|---|---|
| fp64 | float64                         | float64                      |
| fp32 | float32                         | float32, on a GPU without TF32 |
| tf32 | float32                         | float32, multiplied in TF32 (GPU) |
| bf16 | float32                         | bfloat16                     |
"""

from __future__ import annotations

import torch

from puat_fast.config import ConfigError


def name(asked: str, device: torch.device) -> str:
    """The precision in force: `auto` is bf16 on a GPU, else fp32. Raises ConfigError for tf32 without a GPU."""
    if asked == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if asked == "tf32" and device.type == "cpu":
        raise ConfigError("precision: tf32 is of GPUs; accepted on the CPU: auto, fp32, bf16, fp64")
    return asked


def dtype(asked: str) -> torch.dtype:
    """Of weights, images and losses."""
    return torch.float64 if asked == "fp64" else torch.float32


def conv_dtype(asked: str, device: torch.device) -> torch.dtype | None:
    """Of convolutions and activations, where it is not that of the weights. Raises ConfigError as `name`."""
    return torch.bfloat16 if name(asked, device) == "bf16" else None


def allow_tf32(asked: str, device: torch.device) -> None:
    """On a GPU allow or forbid TF32, for the whole process: torch's own default is TF32 in convolutions alone."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = asked == "tf32"
