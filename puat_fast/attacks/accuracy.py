"""How often a classifier is right, under an attack or without one, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from puat_fast.networks.layers import eval_mode, uncompiled
from puat_fast.noise import Noise

Attack = Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]
"""attack(model, x, y, noise) -> x_adv; the noise runs on from batch to batch."""


def correct(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack | None = None,
    *,
    batch_size: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int, float], None] | None = None,
) -> Tensor:
    """For each image, whether argmax model(attack(x)) == y: bool N, on the CPU.

    images: uint8 N x 3 x 32 x 32, used as u/255 in `dtype`; labels: int64 N. The model runs in eval mode on its own
    device and gets its mode back. The attack's draws come from one stream on the CPU, seeded by `seed`, so that they do
    not depend on batch size and device. progress(done, total, accuracy so far) after each batch.
    """
    device = next(model.parameters(), images).device
    noise = Noise(seed, "cpu", dtype)
    right = torch.zeros(len(images), dtype=torch.bool)
    with eval_mode(model):
        for start in range(0, len(images), batch_size):
            stop = start + batch_size
            x = images[start:stop].to(device, dtype).div(255)
            y = labels[start:stop].to(device)
            # a last batch of another size is not worth compiling for
            with nullcontext() if len(x) == batch_size else uncompiled(model):
                if attack is not None:
                    x = attack(model, x, y, noise)
                with torch.no_grad():
                    right[start:stop] = (model(x).argmax(1) == y).cpu()
            if progress is not None:
                done = min(stop, len(images))
                progress(done, len(images), right[:done].double().mean().item())
    return right
