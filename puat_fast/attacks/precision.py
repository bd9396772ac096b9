"""What an attack's model works in while it searches: less than float32 is faster, and only the search may suffer.

What a search finds is judged in fp32. So the accuracy that is reported is a statement about float32 logits of concrete
images, whatever the precision; a weaker search can only make a model look more robust, not less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import get_args

import torch
from torch import nn

from puat_fast.config import SearchPrecision
from puat_fast.networks.layers import Compiled


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ValueError for an unknown name, and for tf32 without a GPU."""
    if precision not in get_args(SearchPrecision):
        raise ValueError(f"precision: {precision!r} is not one of {', '.join(get_args(SearchPrecision))}")
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: tf32 is of GPUs, the model is on {device}; accepted there: fp32, bf16")


@contextmanager
def searching(model: nn.Module, precision: SearchPrecision, device: torch.device) -> Iterator[None]:
    """Inside, convolutions and matrix products of the model work in `precision`; its weights stay as they are.

    fp32: in the dtype of weights and images, on a GPU without TF32, which torch allows in convolutions by itself.
    tf32: float32, multiplied in TF32. bf16: our own networks (`networks.Compiled`, alone or as parts) convolve in
    bfloat16, any other model runs under torch.autocast. What was set before, a bfloat16 run's `conv_dtype` or an
    autocast around the call, is off inside; an autocast within the model's forward is the model's own. Raises
    ValueError as `check_precision`.
    """
    check_precision(precision, device)
    ours = [module for module in model.modules() if isinstance(module, Compiled)]
    before = [(module, module.conv_dtype) for module in ours]
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_tf32(precision == "tf32"))
        stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and not ours))
        try:
            for module in ours:
                module.conv_dtype = torch.bfloat16 if precision == "bf16" else None
            yield
        finally:
            for module, dtype in before:
                module.conv_dtype = dtype


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
