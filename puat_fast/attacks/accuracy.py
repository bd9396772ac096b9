"""How often a classifier is right, under an attack or without one, batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puat_fast.networks.layers import eval_mode, uncompiled
from puat_fast.noise import Noise

Attack = Callable[[nn.Module, Tensor, Tensor, Noise], Tensor]
"""attack(model, x, y, noise) -> x_adv; the noise runs on from batch to batch."""


@dataclass(frozen=True)
class Batch:
    """Images first .. first + len(y) after the attack: x, x_adv and labels y on the model's device; told: its class."""

    first: int
    x: Tensor
    x_adv: Tensor
    y: Tensor
    told: Tensor

    @property
    def right(self) -> Tensor:
        """Whether the model still says y: bool."""
        return self.told == self.y


def walk(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    attack: Attack | None,
    each: Callable[[Batch], None],
    *,
    noise: Noise,
    batch_size: int = 256,
    first: int = 0,
) -> None:
    """Attack all images from number `first` on, and hand over each batch with what the model says of it.

    images: uint8 N x 3 x 32 x 32, used as u/255 in the noise's dtype; labels: int64 N. The model runs in eval mode on
    its own device and gets its mode back.
    """
    device = next(model.parameters(), images).device
    with eval_mode(model):
        for start in range(first, len(images), batch_size):
            stop = start + batch_size
            x = x_adv = images[start:stop].to(device, noise.dtype).div(255)
            y = labels[start:stop].to(device)
            # a last batch of another size is not worth compiling for
            with nullcontext() if len(x) == batch_size else uncompiled(model):
                if attack is not None:
                    x_adv = attack(model, x, y, noise)
                with torch.no_grad():
                    told = model(x_adv).argmax(1)
                each(Batch(start, x, x_adv, y, told))


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

    images, labels, model: as in `walk`, in `dtype`. The attack's draws come from one stream on the CPU, seeded by
    `seed`, so that they do not depend on batch size and device. progress(done, total, accuracy so far): each batch.
    """
    right = torch.zeros(len(images), dtype=torch.bool)

    def note(batch: Batch) -> None:
        done = batch.first + len(batch.y)
        right[batch.first : done] = batch.right.cpu()
        if progress is not None:
            progress(done, len(images), right[:done].double().mean().item())

    walk(model, images, labels, attack, note, noise=Noise(seed, "cpu", dtype), batch_size=batch_size)
    return right
