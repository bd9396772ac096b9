"""The optimisers of the four networks (spec 1.7): torch's, whose steps are our fused ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from puat_fast.config import Config, OptimConfig
from puat_fast.networks import Networks
from puat_fast.networks.layers import BatchNorm2d
from puat_fast.ops import adam_, sgd_ema_


class SGD(torch.optim.SGD):
    """torch.optim.SGD that takes a teacher along; its checkpoints are torch's.

    After each step of C: theta' <- ema_decay theta' + (1 - ema_decay) theta; decay 0 copies, so that no NaN of theta'
    survives. Each group's "ema_decay" is set beside its "lr"; until then the teacher stays as it is.

    The groups differ in weight decay alone: all else is the first one's. `on_device`, where it is set, holds learning
    rate, momentum and teacher's decay as 0-d tensors, which a captured step reads instead of the groups' numbers.
    """

    def __init__(self, groups: list[dict[str, Any]], teacher: dict[Tensor, Tensor], **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        self.teacher = teacher
        self.on_device: tuple[float | Tensor, float | Tensor, float | Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        params = [(p, group["weight_decay"]) for group in self.param_groups for p in group["params"]]
        params = [(p, decay) for p, decay in params if p.grad is not None]
        for p, _ in params:
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        group = self.param_groups[0]
        numbers = group["lr"], group["momentum"], group.get("ema_decay", 1.0)
        lr, momentum, ema_decay = self.on_device or numbers
        sgd_ema_(
            [p for p, _ in params],
            [p.grad for p, _ in params],
            [self.state[p]["momentum_buffer"] for p, _ in params],
            [self.teacher[p] for p, _ in params],
            lr=lr,
            momentum=momentum,
            weight_decays=[decay for _, decay in params],
            ema_decay=ema_decay,
            nesterov=group["nesterov"],
        )


class Adam(torch.optim.Adam):
    """torch.optim.Adam without weight decay or amsgrad; its checkpoints are torch's."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    step = torch.zeros((), device=p.device)
                    self.state[p] |= {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            states = [self.state[p] for p in params]
            adam_(
                params,
                [p.grad for p in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Each step count on the device of its parameter, and not shared with the state that was loaded."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for p, own in self.state.items():
            own["step"] = own["step"].to(p.device, torch.float32, copy=True)


def sgd(C: nn.Module, C_ema: nn.Module, config: OptimConfig) -> SGD:
    """SGD with Nesterov momentum for C, followed by C_ema; weight decay spares BatchNorm unless `decay_bn`."""
    of_norms = {id(p) for m in C.modules() if isinstance(m, BatchNorm2d) for p in m.parameters()}
    decayed = [p for p in C.parameters() if config.decay_bn or id(p) not in of_norms]
    spared = [p for p in C.parameters() if not config.decay_bn and id(p) in of_norms]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    teacher: dict[Tensor, Tensor] = dict(zip(C.parameters(), C_ema.parameters(), strict=True))
    momentum = 0.9 if config.cycle_momentum else config.momentum  # the engine overwrites it at every step when cycled
    return SGD(groups, teacher, lr=config.lr, momentum=momentum, nesterov=momentum > 0)


def adam(net: nn.Module, config: Config) -> Adam:
    """Adam for G, D or A: constant rate, no weight decay, eps 1e-8."""
    return Adam(net.parameters(), lr=config.gan.lr, betas=config.gan.betas, eps=1e-8)


def optimizers(nets: Networks, config: Config) -> dict[str, torch.optim.Optimizer]:
    """One optimiser per trained network, by its name D, G, A, C."""
    return {
        "D": adam(nets.D, config),
        "G": adam(nets.G, config),
        "A": adam(nets.A, config),
        "C": sgd(nets.C, nets.C_ema, config.optim),
    }
