"""Linear models, where the worst case is known: eps |w|_1 off the margin in L-inf, eps |w|_2 in L2.

Each image is placed so that its distance to another class is a given multiple of eps, no pixel near 0 or 1: an attack
must fool the images below 1 and no other.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reference_attacks import distance
from torch import Tensor, nn

from puat_fast.attacks import apgd_ce, apgd_t, autoattack, fab_t, gpgd, pgd, square, usong
from puat_fast.attacks.autoattack.square import bump_pair

SIZE = (3, 4, 4)
EPS = {"linf": 0.02, "l2": 0.05}
FACTORS = torch.tensor([0.3, 0.9, 0.98, 0.999, 1.001, 1.02, 1.1, 1.5] * 3, dtype=torch.float64)
FAR = 5.0
"""Distance to all classes but the nearest, in eps: out of sight of the loss everywhere in the ball."""

both_norms = pytest.mark.parametrize("norm", ["linf", "l2"])


class Linear(nn.Module):
    """K logits, linear in the image."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits N x K."""
        return x.flatten(1) @ self.weight.T


def random_weights(num_classes: int, seen: int = 4) -> Tensor:
    """K x 48 for the first `seen` rows and columns, else 0.

    Steep, so that softmax sees the nearest class only; of mean 0, so that gray is near all boundaries.
    """
    g = torch.Generator().manual_seed(num_classes)
    weight = torch.zeros(num_classes, *SIZE, dtype=torch.float64)
    values = 10 * torch.randn(num_classes, 3, seen, seen, generator=g, dtype=torch.float64)
    weight[:, :, :seen, :seen] = values - values.mean((1, 2, 3), keepdim=True)
    return weight.flatten(1)


def place(weight: Tensor, factors: Tensor, norm: str, eps: float, base: Tensor) -> tuple[Tensor, Tensor]:
    """(points N x D near base, labels): point i is factors[i] eps from the nearest other class, FAR eps from the rest.

    The dual norm of w_y - w_t makes a distance of a margin; the points are the solutions closest to `base`.
    """
    points, labels = [], []
    num_classes = len(weight)
    for i, factor in enumerate(factors):
        y, nearest = i % num_classes, (i + 1 + i // 4 % (num_classes - 1)) % num_classes
        others = [t for t in range(num_classes) if t != y]
        slopes = weight[y] - weight[others]
        dual = slopes.abs().sum(1) if norm == "linf" else slopes.norm(dim=1)
        wanted = eps * dual * torch.tensor([factor if t == nearest else FAR for t in others])
        points.append(base[i] + torch.linalg.pinv(slopes) @ (wanted - slopes @ base[i]))
        labels.append(y)
    return torch.stack(points), torch.tensor(labels)


def setting(num_classes: int, norm: str, seen: int = 4) -> tuple[Linear, Tensor, Tensor]:
    """(net, images, labels), in float64."""
    weight = random_weights(num_classes, seen)
    base = 0.45 + 0.1 * torch.rand(len(FACTORS), 48, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    points, y = place(weight, FACTORS, norm, EPS[norm], base)
    assert EPS[norm] < points.min() and points.max() < 1 - EPS[norm]
    return Linear(weight), points.view(-1, *SIZE), y


def worst_margin(net: Linear, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """min over the ball of z_y - max of the other z."""
    z, w = net(x), net.weight.detach()
    slopes = w[y][:, None] - w[None]
    dual = slopes.abs().sum(2) if norm == "linf" else slopes.norm(dim=2)
    margins = z.gather(1, y[:, None]) - z - EPS[norm] * dual
    return margins.scatter(1, y[:, None], torch.inf).amin(1).detach()


def margin(net: Linear, x: Tensor, y: Tensor) -> Tensor:
    z = net(x).detach()
    return z.gather(1, y[:, None]).squeeze(1) - z.scatter(1, y[:, None], -torch.inf).amax(1)


def exactly(fooled: Tensor, slack: float = 0.0) -> bool:
    """Whether those and only those with a factor below 1 are fooled; those within the slack may be, or not."""
    sure = (FACTORS - 1).abs() > slack
    return torch.equal(fooled[sure], (FACTORS < 1)[sure])


PGD = {"linf": {"step_size": 0.005, "num_steps": 20}, "l2": {"step_size": 0.025, "num_steps": 60}}


@pytest.mark.parametrize("num_classes", [2, 3])
@both_norms
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_pgd_fools_what_can_be_fooled_and_reaches_the_worst_margin(loss, random_start, norm, num_classes):
    net, x, y = setting(num_classes, norm)
    x_adv = pgd(net, x, y, eps=EPS[norm], norm=norm, loss=loss, random_start=random_start, **PGD[norm])
    assert exactly(net(x_adv).argmax(1) != y)
    assert (distance(x_adv, x, norm) <= EPS[norm] * (1 + 1e-9)).all()
    reached, worst = margin(net, x_adv, y), worst_margin(net, x, y, norm)
    if loss == "cw":  # which stops where the net is wrong
        reached, worst = reached[FACTORS > 1], worst[FACTORS > 1]
    # a trace of the gradients of far classes bends the direction, e^-30 of it
    torch.testing.assert_close(reached, worst, rtol=0, atol=1e-6)


@both_norms
def test_pgd_kl_needs_restarts_where_the_largest_divergence_is_on_either_side(norm):
    """KL grows towards more certainty too, and the first gradient says which way it goes."""
    net, x, y = setting(2, norm)
    attack = {"eps": EPS[norm], "norm": norm, "loss": "kl", **PGD[norm]}
    once, often = (net(pgd(net, x, y, restarts=n, **attack)).argmax(1) != y for n in (1, 12))
    assert exactly(often) and 0 < once.sum() < often.sum() and not (once & ~often).any()


@pytest.mark.parametrize("num_classes", [2, 3])
@both_norms
@pytest.mark.parametrize("attack", [apgd_ce, apgd_t])
@pytest.mark.parametrize("faithful", [False, True])
def test_apgd_fools_what_can_be_fooled(attack, faithful, norm, num_classes):
    net, x, y = setting(num_classes, norm)
    x_adv = attack(net, x, y, eps=EPS[norm], norm=norm, num_steps=50, faithful=faithful)
    fooled = net(x_adv).argmax(1) != y
    assert exactly(fooled) and torch.equal(x_adv[~fooled], x[~fooled])
    assert (distance(x_adv, x, norm) <= EPS[norm] * (1 + 1e-9)).all()


@pytest.mark.parametrize("num_classes", [2, 3])
@both_norms
@pytest.mark.parametrize("faithful", [False, True])
def test_fab_finds_the_distance_to_one_percent(faithful, norm, num_classes):
    """It goes 1.05 of the way, back by 0.9 and to the plane again, pulled towards x by 0.1: 1.0052 in the end."""
    net, x, y = setting(num_classes, norm)
    fooled = net(fab_t(net, x, y, eps=EPS[norm], norm=norm, faithful=faithful)).argmax(1) != y
    assert exactly(fooled, slack=0.006)
    anywhere = fab_t(net, x, y, eps=3 * EPS[norm], norm=norm, faithful=faithful)
    found = distance(anywhere, x, norm) / (EPS[norm] * FACTORS)
    assert (net(anywhere).argmax(1) != y).all() and found.min() >= 1 and found.max() < 1.006


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("faithful", [False, True])
def test_square_sets_each_pixel_of_a_small_image_right(faithful, num_classes):
    """After 200 queries its squares on 4 x 4 are single pixels, each hit some 80 times: it ends in the best corner."""
    # the reference never puts a square at the last row or column: they keep their stripes
    net, x, y = setting(num_classes, "linf", seen=3 if faithful else 4)
    x_adv = square(net, x, y, eps=EPS["linf"], num_queries=1500, faithful=faithful)
    assert exactly(net(x_adv).argmax(1) != y)


def test_square_in_l2_reaches_what_its_bumps_can_express():
    """L2 perturbations are sums of bumps of equal energy in each channel: exact for weights of that shape.

    On 3 x 3 the bump covers the image, and each accepted query halves the angle to it.
    """
    signs = torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    w = 3 * (signs * bump_pair(3)).double().flatten()
    weight = torch.stack([w, -w])
    points, y = place(weight, FACTORS, "l2", 0.1, torch.full((len(FACTORS), 27), 0.5, dtype=torch.float64))
    net, x = Linear(weight), points.view(-1, 3, 3, 3)
    x_adv = square(net, x, y, eps=0.1, norm="l2", num_queries=1500)
    assert exactly(net(x_adv).argmax(1) != y)
    assert (distance(x_adv, x, "l2") <= 0.1 * (1 + 1e-6)).all()


@pytest.mark.parametrize("num_classes", [3, 4])
@both_norms
@pytest.mark.filterwarnings("ignore:apgd-t. the DLR loss needs 4 classes")
def test_autoattack_fools_what_can_be_fooled_and_warns_of_nothing(norm, num_classes, recwarn):
    net, x, y = setting(num_classes, norm)
    result = autoattack(net, x, y, EPS[norm], norm=norm, iterations=50, num_queries=300)
    assert exactly(~result.robust) and torch.equal(net(result.x_adv).argmax(1) != y, ~result.robust)
    assert not [w for w in recwarn if "DLR" not in str(w.message)]
    # a single attack leaves nothing to the later ones
    assert set(result.broken_by) == {None, "apgd-ce"}


# -- in latent space ------------------------------------------------------------------------------------------------


class LinearGenerator(nn.Module):
    """Gen(z, y) = 0.5 + z M, the same for all y."""

    num_classes, z_dim = 2, 10

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(4)
        self.matrix = nn.Parameter(torch.randn(10, 48, generator=g, dtype=torch.float64) / 10)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """N x 3 x 4 x 4."""
        return (0.5 + z @ self.matrix).view(-1, *SIZE)


class Indifferent(nn.Module):
    """A discriminator that finds all labels as likely."""

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        """(nothing, N x 3)."""
        return None, x.flatten(1)[:, :3] * 0 - 1.0


def latent_setting(eps: float) -> tuple[Linear, LinearGenerator, Tensor, Tensor]:
    """(net, generator, z, y): z is FACTORS eps from the other class, in latent space, L-inf."""
    generator, weight = LinearGenerator(), random_weights(2)
    base = torch.randn(len(FACTORS), 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    z, y = place(weight @ generator.matrix.detach().T, FACTORS, "linf", eps, base)
    return Linear(weight), generator, z, y


@pytest.mark.parametrize("start", ["ball", "image"])
@pytest.mark.parametrize("step_size", [0.02, 0.1])
def test_gpgd_fools_what_can_be_fooled(step_size, start):
    net, generator, z, y = latent_setting(0.1)
    found = gpgd(net, generator, y, z=z, eps=0.1, step_size=step_size, num_steps=20, start=start)
    assert exactly(net(found.x_adv).argmax(1) != y) and found.delta.abs().max() <= 0.1
    assert (net(found.x_nat).argmax(1) == y).all()


def test_usong_held_by_its_norm_fools_what_can_be_fooled_within_a_step():
    """With all the weight on the soft bound, an element goes at most a step beyond eps, and comes back."""
    net, generator, z, y = latent_setting(0.1)
    attack = partial(usong, net, generator, Indifferent(), y, z=z, eps=0.1, norm_weight=1e9, num_steps=200)
    found = attack(step_size=0.001)
    assert exactly(net(found.x_adv).argmax(1) != y, slack=0.015) and found.delta.abs().max() <= 0.101 + 1e-9
    assert attack(step_size=0.1).delta.abs().max() > 0.15  # the paper's step: up to twice the ball
