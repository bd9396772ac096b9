"""FLOPs of one PUAT step, counted on the meta device: the step's own code, full size, no data.

Counted: convolutions and matrix products, 2 per multiply-add. Not counted: everything elementwise (under 1 %), and
spectral norm's matrix-vector products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from puat_fast.config import Config, FastConfig
from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.engine.step import Engine
from puat_fast.methods import Phase
from puat_fast.networks import Networks
from puat_fast.noise import Noise

aten = torch.ops.aten
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "digits": 10, "svhn": 10, "tiny-imagenet": 10, "imagenet32": 10}
STEPS_PER_EPOCH = 196  # of CIFAR: what the schedules see

Counts = dict[str, dict[str, float]]
"""FLOPs by phase (D, G, A, C, other) and kind (fprop, dgrad, wgrad, matmul)."""


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside, under the current `phase`.

    Not torch's FlopCounterMode: that one hooks modules and fails under autograd.grad (torch 2.13).
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.counts: Counts = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for kind, flops in _flops(func, args, result):
            phase = self.counts.setdefault(self.phase, {})
            phase[kind] = phase.get(kind, 0.0) + flops
        return result


def _flops(func: Any, args: Any, result: Any) -> list[tuple[str, float]]:
    if func is aten.convolution.default:
        return [("fprop", 2.0 * result.numel() * args[1][0].numel())]
    if func is aten.convolution_backward.default:
        one = 2.0 * args[0].numel() * args[2][0].numel()  # of grad_output and weight
        return [(kind, one) for kind, wanted in zip(("dgrad", "wgrad"), args[-1], strict=False) if wanted]
    if func in (aten.mm.default, aten.bmm.default):
        return [("matmul", 2.0 * result.numel() * args[0].shape[-1])]
    if func is aten.addmm.default:
        return [("matmul", 2.0 * result.numel() * args[1].shape[-1])]
    return []


class MetaNoise(Noise):
    """Draws without numbers: the meta device has no generator."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("meta"), torch.float32

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        return torch.empty(*shape, device=self.device, dtype=self.dtype)

    uniform = normal


def meta_engine(config: Config) -> Engine:
    """An engine on the meta device, in the first step of stage 2."""
    noise = MetaNoise()
    with torch.device("meta"):
        nets = Networks.build(config, NUM_CLASSES[config.dataset], noise)
    engine = Engine(config, nets, noise, STEPS_PER_EPOCH)
    if engine.stage == 1:
        engine.begin_stage2()
    return engine


def meta_batch(config: Config) -> StepBatch:
    """A StepBatch of the config's sizes, without numbers."""
    n = config.schedule.batch_size

    def images() -> Tensor:
        return torch.empty(n, 3, 32, 32, device="meta")

    y = torch.empty(n, dtype=torch.int64, device="meta")
    disc = [DiscBatch(images(), y, images(), images()) for _ in range(config.schedule.n_disc)]
    return StepBatch(D=disc, C=SemiBatch(images(), y, images()))


def count_step(config: Config, prepare: Callable[[Engine], None] | None = None) -> Counts:
    """FLOPs that the engine executes in one step of stage 2; `prepare` may change the engine first.

    torch.compile and CUDA graphs do not change them, and stay off: nothing can be compiled for the meta device.
    """
    config = replace(config, precision="fp32", fast=replace(config.fast, compile=False, graph=False))
    engine, batch, counter = meta_engine(config), meta_batch(config), FlopCounter()
    if prepare is not None:
        prepare(engine)
    update = engine._update

    def counted(phase: Phase, *args: Any) -> None:
        counter.phase = phase.net
        update(phase, *args)
        counter.phase = "other"

    engine._update = counted  # type: ignore[method-assign]
    with counter:
        engine.step(batch)
    return counter.counts


def count_necessary(config: Config) -> Counts:
    """FLOPs that one step needs with the semantics that `config` names: every exact short cut taken."""
    return count_step(replace(config, engine="compiled", fast=FastConfig()))


def total(counts: Counts) -> float:
    """FLOPs of all phases."""
    return sum(sum(kinds.values()) for kinds in counts.values())
