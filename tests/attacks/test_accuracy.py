"""attacks.accuracy: right or wrong image by image, batch by batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from puat_fast.attacks import accuracy


class Brightness(nn.Module):
    """Says the class that is written in the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(255.0))

    def forward(self, x: Tensor) -> Tensor:
        """Logits N x 4."""
        return -(x[:, 0, 0, 0, None] * self.scale - torch.arange(4.0)).abs()


def test_correct_says_image_by_image():
    images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(10) % 4
    labels = torch.tensor([0, 1, 2, 3, 3, 1, 0, 3, 0, 1])
    seen: list[tuple[int, int, float]] = []
    right = accuracy.correct(Brightness(), images, labels, batch_size=3, progress=lambda *a: seen.append(a))
    assert right.tolist() == [1, 1, 1, 1, 0, 1, 0, 1, 1, 1]
    assert [(done, total) for done, total, _ in seen] == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert seen[-1][2] == pytest.approx(0.8)


def test_each_batch_gets_draws_of_its_own_and_eval_mode():
    calls: list[tuple[int, float, bool]] = []

    def attack(model, x, y, noise):
        calls.append((len(x), float(noise.uniform("rae", (1,))), model.training))
        return x

    model = Brightness().train()
    accuracy.correct(model, torch.zeros(7, 3, 32, 32, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64), attack,
                     batch_size=3, seed=5)  # fmt: skip
    assert [n for n, _, _ in calls] == [3, 3, 1] and len({u for _, u, _ in calls}) == 3
    assert not any(training for _, _, training in calls) and model.training


def test_images_are_exactly_u_over_255():
    got: list[Tensor] = []
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    model = Brightness()
    model.register_forward_pre_hook(lambda m, inputs: got.append(inputs[0]))
    accuracy.correct(model, images, torch.zeros(1, dtype=torch.int64))
    assert torch.equal(got[0][0, 0].flatten(), torch.arange(256.0) / 255)
