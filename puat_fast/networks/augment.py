"""C's own augmentation: random crop, flip and rotation of a tensor batch, differentiable for PGD through it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.noise import Noise


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
        n = len(x)
        if self.crop_pad or self.flip:
            x = self._crop_flip(x, n)
        if self.rotate_deg:
            x = self._rotate(x, n)
        return x

    def _draw(self, name: str, n: int) -> Tensor:
        """U[0,1) per image, N x 1; in scope `batch` the same number for all."""
        draws = self.noise.uniform(f"augment/{name}", (n if self.scope == "image" else 1, 1))
        return draws.expand(n, 1)

    def _crop_flip(self, x: Tensor, n: int) -> Tensor:
        height, width, pad = x.shape[2], x.shape[3], self.crop_pad
        rows = torch.arange(height, device=x.device).expand(n, height)
        columns = torch.arange(width, device=x.device).expand(n, width)
        if pad:
            x = F.pad(x, (pad, pad, pad, pad))
            # floor(u (2 pad + 1)) could round up to 2 pad + 1 itself for u next to 1
            rows = rows + (self._draw("top", n) * (2 * pad + 1)).long().clamp_max(2 * pad)
            left = (self._draw("left", n) * (2 * pad + 1)).long().clamp_max(2 * pad)
        if self.flip:
            columns = torch.where(self._draw("flip", n) < 0.5, width - 1 - columns, columns)
        if pad:
            columns = columns + left
        index = rows[:, :, None] * x.shape[3] + columns[:, None, :]
        picked = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1))
        return picked.unflatten(2, (height, width))

    def _rotate(self, x: Tensor, n: int) -> Tensor:
        angle = (self._draw("angle", n)[:, 0] * 2 - 1) * math.radians(self.rotate_deg)
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
        grid = F.affine_grid(theta.to(x.dtype), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
