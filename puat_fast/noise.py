"""The only source of randomness of a training step: named draws from one generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """Draws of a training step, each under a name, from one torch.Generator on the device.

    Names: `z` (latents of G), `rae` (start of the PGD attack), `augment/...` (C's augmentation). The name does not
    change a draw; it lets a test replay recorded ones (see puat_fast.testing.RecordedNoise).
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """N(0, 1), of the given shape."""
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def uniform(self, name: str, shape: Sequence[int]) -> Tensor:
        """U[0, 1), of the given shape."""
        return torch.rand(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """State of the generator: a later load continues the same stream."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue the stream of `state_dict`."""
        self.generator.set_state(state["generator"].cpu())
