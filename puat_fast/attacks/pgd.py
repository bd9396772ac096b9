"""PGD: projected gradient ascent in an L-inf or L2 ball (Madry et al. 2018), for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from puat_fast import objectives
from puat_fast.networks.layers import eval_mode, frozen_weights
from puat_fast.noise import Noise
from puat_fast.ops.pgd_step import Norm, pgd_step

AttackLoss = Callable[[Tensor], Tensor]


def ascend(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    start: Tensor,
    loss: AttackLoss,
    *,
    eps: float,
    step_size: float,
    num_steps: int,
    norm: Norm = "linf",
) -> Tensor:
    """num_steps of x_adv <- P_eps(x_adv + step_size sign(grad loss(model(x_adv))); x), from `start` as it is.

    norm "l2": grad / |grad|_2 for the sign, the L2 ball for the box, image by image (`ops.pgd_step`).

    x, start: N x 3 x H x W; loss: logits -> scalar to be maximised. The model is run in the mode it is in, and only
    the gradient with respect to the images is computed. Returns x_adv, detached.
    """
    x, x_adv = x.detach(), start.detach()
    for _ in range(num_steps):
        x_adv.requires_grad_()
        with torch.enable_grad():
            value = loss(model(x_adv))
        (grad,) = torch.autograd.grad(value, [x_adv])
        x_adv = pgd_step(x_adv.detach(), grad, x, eps, step_size, norm=norm)
    return x_adv


def gauss_start(x: Tensor, noise: Noise) -> Tensor:
    """x + 0.001 N(0, 1), not clipped: where TRADES and PUAT's official code start."""
    return x.detach() + 0.001 * noise.normal("rae", x.shape)


def uniform_start(x: Tensor, eps: float, noise: Noise) -> Tensor:
    """clip(x + U(-eps, eps), 0, 1)."""
    return (x.detach() + (2 * noise.uniform("rae", x.shape).to(x.device) - 1) * eps).clamp(0, 1)


def l2_start(x: Tensor, eps: float, noise: Noise) -> Tensor:
    """clip(x + r u, 0, 1), u uniform on the unit sphere of each image, r ~ U(0, eps).

    As Rice et al. 2020 and torchattacks have it: closer to x than uniform in the ball, where almost all r are near eps.
    """
    direction = noise.normal("rae", x.shape).to(x.device)
    radius = eps * noise.uniform("rae", (len(x), *[1] * (x.ndim - 1))).to(x.device)
    length = torch.linalg.vector_norm(direction, dim=tuple(range(1, x.ndim)), keepdim=True)
    return (x.detach() + radius * direction / length).clamp(0, 1)


def attack_loss(name: Literal["ce", "cw", "kl"], y: Tensor, logits: Tensor | None = None) -> AttackLoss:
    """The loss that an attack maximises: cross-entropy, CW margin, or KL from the given natural logits."""
    if name == "ce":
        return lambda logits_adv: objectives.cross_entropy(logits_adv, y)
    if name == "cw":
        return lambda logits_adv: objectives.cw_margin(logits_adv, y)
    if name == "kl" and logits is not None:
        natural = logits.detach()
        return lambda logits_adv: objectives.kl_divergence(natural, logits_adv)
    raise ValueError(f"loss: {name!r} is not one of ce, cw, kl (kl needs the natural logits)")


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    step_size: float = 1 / 255,
    num_steps: int = 20,
    loss: Literal["ce", "cw"] = "ce",
    norm: Norm = "linf",
    random_start: bool = True,
    seed: int = 0,
    noise: Noise | None = None,
) -> Tensor:
    """PGD on any classifier: returns x_adv with |x_adv - x| <= eps in `norm`, in [0,1], of x's shape and dtype.

    linf: x <- clip(x0 + clip(x + step_size sign(grad) - x0, -eps, eps), 0, 1), num_steps times, from a uniform start in
    the ball (`random_start`) or from x. l2: x <- clip(P(x + step_size grad / |grad|_2), 0, 1), P onto the L2 ball of
    each image; the start in a uniform direction, at a uniform distance up to eps; usual are eps=128/255,
    step_size=15/255, num_steps=10. model: images in [0,1] -> logits; run in eval mode and given back in its own mode,
    its parameters collect no gradient. x: N x 3 x H x W float, y: N int64. The start is drawn from `noise`, else from a
    new stream seeded by `seed`; the global RNG is not touched. Raises ValueError for eps, step_size < 0, an unknown
    norm or loss, images outside [0,1] or sizes that differ.
    """
    _check(x, y, eps, step_size, num_steps, norm)
    start = x.detach().clone()
    if random_start:
        random = uniform_start if norm == "linf" else l2_start
        start = random(x, eps, Noise(seed, x.device, x.dtype) if noise is None else noise)
    with eval_mode(model), frozen_weights(model):
        return ascend(
            model, x, start, attack_loss(loss, y), eps=eps, step_size=step_size, num_steps=num_steps, norm=norm
        )


def _check(x: Tensor, y: Tensor, eps: float, step_size: float, num_steps: int, norm: str) -> None:
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: {norm!r} is not one of linf, l2")
    for name, value in (("eps", eps), ("step_size", step_size), ("num_steps", num_steps)):
        if not value >= 0:
            raise ValueError(f"{name}: {value} is negative, accepted: >= 0")
    if not x.is_floating_point():
        raise ValueError(f"x: dtype {x.dtype}, expected floating point images in [0,1]")
    if len(x) != len(y):
        raise ValueError(f"y: {len(y)} labels for {len(x)} images")
    if len(x) and not (0 <= x.min() and x.max() <= 1):
        raise ValueError(f"x: values from {x.min():g} to {x.max():g}, expected images in [0,1]")
