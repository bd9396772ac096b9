"""PGD: projected gradient ascent in an L-inf or L2 ball (Madry et al. 2018), for training and for evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast import objectives
from puat_fast.attacks.autoattack.common import Settings, Victim, check_images, seed_global
from puat_fast.networks.layers import eval_mode, frozen_weights
from puat_fast.noise import Noise
from puat_fast.ops.pgd_step import Norm, pgd_step

AttackLoss = Callable[[Tensor], Tensor]
LossName = Literal["ce", "cw", "kl"]


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


def attack_loss(name: LossName, y: Tensor, logits: Tensor | None = None) -> AttackLoss:
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
    loss: LossName = "ce",
    norm: Norm = "linf",
    random_start: bool = True,
    start: Tensor | None = None,
    restarts: int = 1,
    seed: int = 0,
    noise: Noise | None = None,
) -> Tensor:
    """PGD on any classifier: returns x_adv with |x_adv - x| <= eps in `norm`, in [0,1], of x's shape and dtype.

    linf: x <- clip(x0 + clip(x + step_size sign(grad) - x0, -eps, eps), 0, 1), num_steps times, from a uniform start in
    the ball (`random_start`) or from x. l2: x <- clip(P(x + step_size grad / |grad|_2), 0, 1), P onto the L2 ball of
    each image; the start in a uniform direction, at a uniform distance up to eps; usual are eps=128/255,
    step_size=15/255, num_steps=10. The last point is returned, whether or not it fools the model.

    model: any nn.Module, images in [0,1] -> logits N x K; run in eval mode and given back as it was, modes and
    requires_grad; its parameters collect no gradient. x: N x C x H x W, float32, float64 or bfloat16; y: N class
    indices. loss, to be maximised: ce, cross-entropy; cw, -max(z_y - max of the other z, 0); kl, KL(p(x) || p(x_adv)),
    p(x) taken once: it has no gradient at x itself, and so needs another start. start: of x's shape, where to begin
    instead; taken as it is, the first step projects it.

    restarts: PGD from that many random starts. For each image the first that fools the model is returned, else the one
    with the largest loss; what is fooled is not attacked again. Starts are drawn from `noise`, else from a new stream
    seeded by `seed`, in each restart for all images; the global RNG is not touched. The model works in the
    precision that it and torch are set to: `attacks.precision.searching` around the call sets another.

    Source: Madry et al. 2018 (arXiv:1706.06083). Raises ValueError, naming the argument, for images outside [0,1],
    sizes or types that do not fit, labels that the model does not know, numbers out of range, an unknown norm or loss,
    and for outputs that are not finite logits N x K. Warns `AttackWarning` of images that ce or kl did not move at all.
    """
    _check(x, y, step_size, num_steps, loss)
    Settings(eps=eps, norm=norm, restarts=restarts, seed=seed)  # checks them
    _check_start(x, start, random_start, restarts, loss)
    if not len(x):
        return x.detach().clone()
    with _attacking(model, x, seed) as victim:
        # copies: tensors made in inference mode do not go into a backward pass
        images, labels = x.detach().clone().to(victim.device), y.to(victim.device, torch.int64, copy=True)
        classify = checked_logits(victim, int(labels.max()))
        natural = classify(images) if loss == "kl" else None
        noise = noise or Noise(seed, x.device, x.dtype)

        def first_point() -> Tensor:
            if start is not None:
                return start.detach().to(images, copy=True)
            if not random_start:
                return images
            return (uniform_start if norm == "linf" else l2_start)(images, eps, noise)

        def climb(begin: Tensor, rows: Tensor | slice) -> Tensor:
            maximised = attack_loss(loss, labels[rows], None if natural is None else natural[rows])
            return ascend(
                classify, images[rows], begin[rows], maximised,
                eps=eps, step_size=step_size, num_steps=num_steps, norm=norm,
            )  # fmt: skip

        def judge(x_adv: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
            logits = classify(x_adv)
            each = _loss_of_each(loss, logits, labels[rows], None if natural is None else natural[rows])
            return each, logits.argmax(1) != labels[rows]

        begin = first_point()
        x_adv = climb(begin, slice(None))
        if eps > 0 and step_size > 0 and num_steps > 0 and loss != "cw":  # cw has no gradient where the model is wrong
            victim.note_gradients(x_adv - begin)
            victim.warn_of_gradients("pgd", len(x))
        if restarts > 1:
            _go_on(x_adv, (first_point() for _ in range(restarts - 1)), climb, judge)
        victim.check()
    return x_adv.to(x.device)


@contextmanager
def _attacking(model: nn.Module, x: Tensor, seed: int) -> Iterator[Victim]:
    """As AutoAttack's `attacking`, but in the precision that is set: a run in bf16 or TF32 validates in its own."""
    device = next(model.parameters(), x).device
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        stack.enter_context(frozen_weights(model))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        seed_global(seed, device)
        yield Victim(model, device, len(x), pad=device.type == "cuda")


def _go_on(
    x_adv: Tensor,
    starts: Iterable[Tensor],
    climb: Callable[[Tensor, Tensor], Tensor],
    judge: Callable[[Tensor, Tensor | slice], tuple[Tensor, Tensor]],
) -> None:
    """Further restarts, on the images not fooled so far; puts what is better into x_adv."""
    value, fooled = judge(x_adv, slice(None))
    for begin in starts:  # to the end, so that the stream of draws does not depend on what is fooled
        rows = (~fooled).nonzero().flatten()
        if not len(rows):
            continue
        found = climb(begin, rows)
        found_value, hit = judge(found, rows)
        better = hit | (found_value > value[rows])
        x_adv[rows[better]], value[rows[better]] = found[better], found_value[better]
        fooled[rows] = hit


def checked_logits(victim: Victim, largest_label: int) -> Callable[[Tensor], Tensor]:
    """The model, its outputs checked, but without host syncs: `victim.check` asks later whether they were finite."""

    def classify(x: Tensor) -> Tensor:
        logits = victim.logits(x)
        if logits.shape[1] <= largest_label:
            raise ValueError(f"y: label {largest_label}, accepted: 0 to {logits.shape[1] - 1}, the model's classes")
        return logits

    return classify


def _loss_of_each(name: LossName, logits_adv: Tensor, y: Tensor, natural: Tensor | None) -> Tensor:
    """The loss of `attack_loss` image by image, N; for cw without its max(., 0), which no image that is right needs."""
    if natural is not None:
        return F.kl_div(logits_adv.log_softmax(1), natural.softmax(1), reduction="none").sum(1)
    if name == "ce":
        return F.cross_entropy(logits_adv, y, reduction="none")
    right = logits_adv.gather(1, y[:, None])
    return (logits_adv.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True) - right).squeeze(1)


def check_not_negative(name: str, value: float) -> None:
    """Raises ValueError, naming the argument, unless 0 <= value < inf."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: {value}, accepted: finite numbers >= 0")


def _check(x: Tensor, y: Tensor, step_size: float, num_steps: int, loss: str) -> None:
    # the other attacks take no bfloat16: it holds images, and so the ball, to 1/512 only
    check_images(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x, y)
    check_not_negative("step_size", step_size)
    if not (isinstance(num_steps, int) and num_steps >= 0):
        raise ValueError(f"num_steps: {num_steps!r}, accepted: integers >= 0")
    if loss not in ("ce", "cw", "kl"):
        raise ValueError(f"loss: {loss!r} is not one of ce, cw, kl")


def _check_start(x: Tensor, start: Tensor | None, random_start: bool, restarts: int, loss: str) -> None:
    if start is not None and not (isinstance(start, Tensor) and start.shape == x.shape and start.is_floating_point()):
        found = f"{start.dtype} of shape {tuple(start.shape)}" if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start: {found}, expected floating point of x's shape {tuple(x.shape)}")
    if restarts > 1 and (start is not None or not random_start):
        given = "a given start" if start is not None else "random_start=False"
        raise ValueError(f"restarts: {restarts} with {given} would all be the same, accepted: 1, or random starts")
    if loss == "kl" and start is None and not random_start:
        raise ValueError("random_start: False, but loss kl has no gradient at x itself; accepted: True, or a `start`")
