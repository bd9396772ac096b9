"""A: the attacker that perturbs G's latent so that C errs (spec 1.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puat_fast.networks.generator import CBNBlock
from puat_fast.networks.layers import Compiled, channels_last


class Attacker(Compiled):
    """A(z, y) = z_a = z + clip * tanh(net(z, y)), so |z_a - z|_inf <= clip.

    net: Linear -> 16 x 4 x 4, residual blocks 16 -> 32 -> 16 with conditional BN, Linear -> z_dim.
    """

    def __init__(self, num_classes: int, z_dim: int = 256, clip: float = 0.1) -> None:
        super().__init__()
        self.clip = clip
        self.linear_in = nn.Linear(z_dim, 256)
        self.blocks = nn.ModuleList(
            [CBNBlock(16, 32, num_classes, upsample=False), CBNBlock(32, 16, num_classes, upsample=False)]
        )
        self.linear_out = nn.Linear(256, z_dim)
        nn.init.xavier_uniform_(self.linear_in.weight)
        nn.init.xavier_uniform_(self.linear_out.weight)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """z: N x z_dim, y: N class indices -> z_a, N x z_dim."""
        return self.core(z, y)

    def _core(self, z: Tensor, y: Tensor) -> Tensor:
        h = channels_last(self.linear_in(z).unflatten(1, (16, 4, 4)), z.dtype)
        for block in self.blocks:
            h = block(h, y)
        return z + self.clip * torch.tanh(self.linear_out(h.flatten(1)))
