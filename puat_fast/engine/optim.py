"""The optimisers of the four networks (spec 1.7)."""

from __future__ import annotations

import torch
from torch import nn

from puat_fast.config import Config, OptimConfig
from puat_fast.networks import Networks
from puat_fast.networks.layers import BatchNorm2d


def sgd(C: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum for C; weight decay spares BatchNorm gains and biases unless `decay_bn`."""
    of_norms = {id(p) for m in C.modules() if isinstance(m, BatchNorm2d) for p in m.parameters()}
    decayed = [p for p in C.parameters() if config.decay_bn or id(p) not in of_norms]
    spared = [p for p in C.parameters() if not config.decay_bn and id(p) in of_norms]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    momentum = 0.9 if config.cycle_momentum else config.momentum  # the engine overwrites it at every step when cycled
    return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0)


def adam(net: nn.Module, config: Config) -> torch.optim.Adam:
    """Adam for G, D or A: constant rate, no weight decay, eps 1e-8."""
    return torch.optim.Adam(net.parameters(), lr=config.gan.lr, betas=config.gan.betas, eps=1e-8)


def optimizers(nets: Networks, config: Config) -> dict[str, torch.optim.Optimizer]:
    """One optimiser per trained network, by its name D, G, A, C."""
    return {
        "D": adam(nets.D, config),
        "G": adam(nets.G, config),
        "A": adam(nets.A, config),
        "C": sgd(nets.C, config.optim),
    }
