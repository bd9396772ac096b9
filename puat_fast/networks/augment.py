"""C's own augmentation: random crop, flip and rotation of a tensor batch, differentiable for PGD through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from puat_fast.noise import Noise
from puat_fast.ops import augment


class Augment(nn.Module):
    """Zero-pad and crop back, horizontal flip (p 0.5), rotation U(-deg, deg) (nearest, fill 0), in this order.

    scope `image`: one draw per image; `batch`: one draw for the whole batch, as the official code does (spec 1.8).
    A new draw in every call.
    """

    def __init__(self, noise: Noise, crop_pad: int, flip: bool, rotate_deg: float, scope: str) -> None:
        super().__init__()
        self.noise, self.crop_pad, self.flip, self.rotate_deg, self.scope = noise, crop_pad, flip, rotate_deg, scope

    def forward(self, x: Tensor) -> Tensor:
        """x: N x C x H x W -> the same shape; gradients flow to the pixels that are kept."""
        rows = len(x) if self.scope == "image" else 1
        top_left = flip = cos_sin = None
        if self.crop_pad:
            top_left = torch.cat([self._offset("top", rows), self._offset("left", rows)], 1)
        if self.flip:
            flip = self._draw("flip", rows)[:, 0] < 0.5
        if self.rotate_deg:
            angle = (self._draw("angle", rows) * 2 - 1) * math.radians(self.rotate_deg)
            cos_sin = torch.cat([angle.cos(), angle.sin()], 1)
        return augment(x, top_left=top_left, flip=flip, cos_sin=cos_sin, pad=self.crop_pad)

    def _draw(self, name: str, rows: int) -> Tensor:
        """U[0,1), rows x 1."""
        return self.noise.uniform(f"augment/{name}", (rows, 1))

    def _offset(self, name: str, rows: int) -> Tensor:
        """Uniform among 0..2 pad; floor(u (2 pad + 1)) could round up to 2 pad + 1 itself for u next to 1."""
        return (self._draw(name, rows) * (2 * self.crop_pad + 1)).long().clamp_max(2 * self.crop_pad)
