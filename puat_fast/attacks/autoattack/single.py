"""The attacks of AutoAttack one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from puat_fast.attacks.autoattack.apgd import Apgd, faithful_apgd
from puat_fast.attacks.autoattack.common import Settings, Victim, attacking, check_images
from puat_fast.attacks.autoattack.fab import Fab, faithful_fab
from puat_fast.attacks.autoattack.lanes import Kernel, LaneRun, State
from puat_fast.attacks.autoattack.square import Square, faithful_square
from puat_fast.ops.pgd_step import Norm

Report = Callable[[int, int, int], None]
Save = Callable[[Callable[[], State]], None]


def run_attack(
    name: str,
    victim: Victim,
    x: Tensor,
    y: Tensor,
    settings: Settings,
    report: Report | None = None,
    save: Save | None = None,
    saved: State | None = None,
) -> Tensor:
    """x_adv of one attack on images that the model gets right; x where nothing fooled. All on the model's device.

    What was found in a lower precision but does not fool in float32 is attacked again in float32. save, saved: of
    `LaneRun`, but for `faithful`.
    """
    if not len(x):
        return x.clone()
    if settings.faithful:
        return _faithful(name, victim, x, y, settings)
    # from the second largest logit on: y is the largest
    targets = victim.all_logits(x).sort(dim=1).indices.flip(1)[:, 1 : victim.num_targets(settings) + 1]
    run = LaneRun(_kernel(name, victim, x, y, targets, settings), victim, settings.batch_size)
    if saved is not None:
        run.load(saved)
    with victim.searched(settings.precision):
        found = run.run(report, save)
    if settings.precision != "fp32":
        doubtful = (victim.all_logits(found.x_out).argmax(1) == y) & found.fooled.to(y.device)
        again = replace(settings, precision="fp32")
        found.x_out[doubtful] = run_attack(name, victim, x[doubtful], y[doubtful], again)
        found.late[doubtful.cpu()] = False  # not fooled at all, and counted by the second run if late there
    victim.late += int(found.late.sum())
    return found.x_out


def _kernel(name: str, victim: Victim, x: Tensor, y: Tensor, targets: Tensor, settings: Settings) -> Kernel:
    if name == "square":
        return Square(victim, x, y, settings)
    if name == "fab-t":
        return Fab(victim, x, y, targets, settings)
    return Apgd(victim, x, y, None if name == "apgd-ce" else targets, settings)


def _faithful(name: str, victim: Victim, x: Tensor, y: Tensor, settings: Settings) -> Tensor:
    num_targets = victim.num_targets(settings)
    attacks: dict[str, Callable[[Victim, Tensor, Tensor, Settings], Tensor]] = {
        "apgd-ce": partial(faithful_apgd, 0),
        "apgd-t": partial(faithful_apgd, num_targets),
        "fab-t": partial(faithful_fab, num_targets),
        "square": faithful_square,
    }
    batches = zip(x.split(settings.batch_size), y.split(settings.batch_size), strict=True)
    return torch.cat([attacks[name](victim, x_part, y_part, settings) for x_part, y_part in batches])


def attack_alone(name: str, model: nn.Module, x: Tensor, y: Tensor, settings: Settings) -> Tensor:
    """x_adv of one attack, checked from end to end: images that the model gets wrong already stay as they are."""
    check_images(x, y)
    if not len(x):
        return x.clone()
    with attacking(model, x, settings) as victim:
        images, labels = x.detach().clone().to(victim.device), y.to(victim.device, torch.int64)
        right = victim.look(images, labels).argmax(1) == labels
        x_adv = images.clone()
        if settings.eps > 0:
            x_adv[right] = run_attack(name, victim, images[right], labels[right], settings)
        victim.warn_of_gradients(name, len(x))
    return x_adv.to(x.device)


def apgd_ce(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    num_steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    batch_size: int = 250,
    seed: int = 0,
    faithful: bool = False,
) -> Tensor:
    """Auto-PGD on the cross-entropy: x_adv, of x's shape and dtype, with |x_adv - x| <= eps and in [0,1].

        max CE(model(x_adv), y) by sign steps (l2: normalised ones) with momentum; step size 2 eps, halved where the
        loss stops rising. `Apgd` holds the formula.

    model: any nn.Module, images in [0,1] -> logits N x K; run in eval mode and given back as it was, modes and
    requires_grad; its weights collect no gradient. x: N x C x H x W, float32 or float64 in [0,1]; y: N class indices.
    Images that the model gets wrong already, or that are not fooled, come back as they are. eps: radius in `norm`, in
    units of the range [0,1]; 0 returns x. restarts: further random starts for what is not fooled yet.

    faithful False: examples leave their batch within a few steps of being fooled and others take their place, so that
    batches of batch_size stay full; where the model is compiled or on a GPU, they are padded to four sizes. Each draw
    depends on seed, the number of the image and of the restart, so that, but for rounding, which images are fooled does
    not depend on batch_size (by which target or restart may). True: order, batches and random numbers of pyautoattack;
    its x_adv bit for bit on a CPU in float32, with the same batch_size and seed. The global generators are left as they
    were.

    Source: Croce & Hein 2020 (arXiv:2003.01690). Raises ValueError naming the argument and what is accepted; also for a
    model that returns no logits, or NaN. Warns `AttackWarning` where the gradient is zero.
    """
    settings = Settings(
        eps=eps, norm=norm, num_steps=num_steps, restarts=restarts, rho=rho, batch_size=batch_size, seed=seed,
        faithful=faithful,
    )  # fmt: skip
    return attack_alone("apgd-ce", model, x, y, settings)


def apgd_t(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int = 9,
    restarts: int = 1,
    rho: float = 0.75,
    batch_size: int = 250,
    seed: int = 0,
    faithful: bool = False,
) -> Tensor:
    """Auto-PGD on the targeted DLR loss, for each of the num_targets classes with the largest logits after y.

        max -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), z = model(x_adv), z_(i) the i-th largest

    An image is fooled by any wrong class. Of K classes, min(num_targets, K - 1) are targets. With K = 2 or 3 there is
    no fourth logit: the loss is then z_t - z_y, also with `faithful`, as the reference fails there.
    All else as in `apgd_ce`; the targets of a restart run side by side in one batch.
    """
    settings = Settings(
        eps=eps, norm=norm, num_steps=num_steps, num_targets=num_targets, restarts=restarts, rho=rho,
        batch_size=batch_size, seed=seed, faithful=faithful,
    )  # fmt: skip
    return attack_alone("apgd-t", model, x, y, settings)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    num_queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    faithful: bool = False,
) -> Tensor:
    """Square Attack: random search on the margin z_y - max_k z_k by square-shaped changes; no gradient is used.

    num_queries: forward passes for each image and restart, besides the one at the start. p_init: part of the image that
    the first squares cover; it is halved after 10, 50, 200, 500, 1000, 2000 and 4000 queries, whatever num_queries is.
    Positions and signs of a query are the same for all images of a restart (but for the start, and for the signs with
    l2 and faithful). All else as in `apgd_ce`.

    Source: Andriushchenko et al. 2020 (arXiv:1912.00049).
    """
    settings = Settings(
        eps=eps, norm=norm, num_queries=num_queries, p_init=p_init, restarts=restarts, batch_size=batch_size, seed=seed,
        faithful=faithful,
    )  # fmt: skip
    return attack_alone("square", model, x, y, settings)


def fab_t(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float = 8 / 255,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_targets: int = 9,
    restarts: int = 1,
    batch_size: int = 250,
    seed: int = 0,
    faithful: bool = False,
) -> Tensor:
    """FAB with targets: the closest image of another class, sought where z_t = z_y for each of the target classes t.

        x_(i+1) = (1 - a)(x_i + 1.05 d(x_i)) + a (x + 1.05 d(x)), d(p) the shortest way from p to z_t = z_y, linearised

    `Fab` holds the rest. It minimises the distance and not a loss within the ball; an image counts as fooled where one
    of another class is no farther than eps. Targets as in `apgd_t`; faithful keeps the reference's schedule, but its
    projections onto the plane differ by rounding, and so may single results. All else as in `apgd_ce`.

    Source: Croce & Hein 2020 (arXiv:1907.02044).
    """
    settings = Settings(
        eps=eps, norm=norm, num_steps=num_steps, num_targets=num_targets, restarts=restarts, batch_size=batch_size,
        seed=seed, faithful=faithful,
    )  # fmt: skip
    return attack_alone("fab-t", model, x, y, settings)
