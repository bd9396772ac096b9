"""A classifier that knows the digits, the digits, an AC-GAN of nothing, and attacks that are killed on the way."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from small_nets import trained
from torch import Tensor, nn

from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator
from puat_fast.attacks.acgan_file import AcGan
from puat_fast.data.formats import load_dataset


class OnDigits(nn.Module):
    """The small net of 1 x 8 x 8 images, for 3 x 32 x 32 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = trained("bn")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4))


def digits(n: int) -> tuple[Tensor, Tensor]:
    test = load_dataset("digits", None).test
    return torch.tensor(test.images[:n]), torch.tensor(test.labels[:n])


def small_acgan() -> AcGan:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        G, D = AcGenerator(10, z_dim=6, width=2).eval(), AcDiscriminator(10, width=2).eval()
    return AcGan(G, D, "digits", tuple("0123456789"))


class Killed(Exception):
    pass


def killed_and_restarted(measure: Callable[..., Any], after: int) -> tuple[Any, int]:
    """The end of an attack that is killed at each `after`-th save, with what was saved last, and how often it was."""
    saved, deaths = None, 0
    while True:
        on_disk = [b""]
        saves = 0

        def save(state: Any, on_disk: list[bytes] = on_disk) -> None:
            nonlocal saves
            saves += 1
            buffer = io.BytesIO()
            torch.save(state, buffer)
            on_disk[0] = buffer.getvalue()
            if saves == after:
                raise Killed

        try:
            return measure(saved=saved, save=save), deaths
        except Killed:
            deaths += 1
            saved = torch.load(io.BytesIO(on_disk[0]), weights_only=True)
