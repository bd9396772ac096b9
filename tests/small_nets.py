"""Two small classifiers, trained in seconds on the 8 x 8 digits of scikit-learn: one plainly, one adversarially."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from puat_fast.attacks.pgd import ascend, attack_loss

TRAINED_ON = 1000
EPS = 0.1


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """Images N x 1 x 8 x 8 in [0,1], labels; the first TRAINED_ON are what the nets have seen."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target, dtype=torch.int64)


def heldout(n: int) -> tuple[Tensor, Tensor]:
    """n images that no net has seen, and their labels."""
    x, y = digits()
    return x[TRAINED_ON : TRAINED_ON + n], y[TRAINED_ON : TRAINED_ON + n]


def _untrained(kind: str) -> nn.Module:
    if kind == "relu":
        layers: list[nn.Module] = [nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(12 * 16, 10))
    layers = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 16, 3, stride=2, padding=1)]
    return nn.Sequential(*layers, nn.BatchNorm2d(16), nn.SiLU(), nn.Flatten(), nn.Linear(16 * 16, 10))


@functools.cache
def trained(kind: str) -> nn.Module:
    """relu: adversarially, without BatchNorm; bn: BatchNorm and SiLU, on noisy images. Leave it as it is returned."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = _untrained(kind)
        optimizer = torch.optim.Adam(net.parameters(), 5e-3)
        x, y = (part[:TRAINED_ON] for part in digits())
        for _ in range(8):
            for rows in torch.randperm(TRAINED_ON).split(50):
                x_adv, labels = x[rows], y[rows]
                if kind == "relu":
                    loss = attack_loss("ce", labels)
                    x_adv = ascend(net, x_adv, x_adv, loss, eps=EPS, step_size=EPS / 2, num_steps=3)
                else:
                    x_adv = (x_adv + EPS * torch.randn_like(x_adv)).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(net(x_adv), labels).backward()
                optimizer.step()
    return net.eval()
