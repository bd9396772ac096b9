"""Square: equal to the reference implementation, and as strong where batches are shared."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_attacks import accuracy, distance, reference
from small_nets import EPS, heldout, trained

from puat_fast.attacks.autoattack import square
from puat_fast.attacks.autoattack.square import bump_pair, side_of_square

RADII = {"linf": EPS, "l2": 0.5}


@pytest.mark.parametrize("restarts", [1, 2])
@pytest.mark.parametrize("kind", ["relu", "bn"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_faithful_is_the_reference_bit_for_bit(norm, kind, restarts):
    net, (x, y) = trained(kind), heldout(30)
    attack = {"eps": RADII[norm], "norm": norm, "seed": 3}
    theirs = reference("square", net, x, y, n_queries=300, n_restarts=restarts, **attack)
    ours = square(net, x, y, num_queries=300, restarts=restarts, faithful=True, **attack)
    assert torch.equal(ours, theirs) and accuracy(net, ours, y) < accuracy(net, x, y)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_all_5000_queries_too(norm):
    net, (x, y) = trained("relu"), heldout(12)
    theirs = reference("square", net, x, y, eps=RADII[norm], norm=norm)
    assert torch.equal(square(net, x, y, eps=RADII[norm], norm=norm, faithful=True), theirs)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fast_stays_in_the_ball_and_does_not_depend_on_the_batch(norm):
    net, x, y = copy.deepcopy(trained("bn")).double(), heldout(40)[0].double(), heldout(40)[1]
    attack = {"eps": RADII[norm], "norm": norm, "num_queries": 200}
    x_adv = square(net, x, y, **attack)
    assert accuracy(net, x_adv, y) < accuracy(net, x, y)
    assert distance(x_adv, x, norm).max() <= RADII[norm] * (1 + 1e-9) and x_adv.min() >= 0 and x_adv.max() <= 1
    torch.testing.assert_close(square(net, x, y, batch_size=7, **attack), x_adv)
    torch.testing.assert_close(square(net, x[:9], y[:9], **attack), x_adv[:9])
    assert not torch.equal(square(net, x, y, seed=1, **attack), x_adv)
    whole, parts = (square(net, x, y, batch_size=n, restarts=2, **attack) for n in (250, 7))
    assert torch.equal(net(whole).argmax(1) != y, net(parts).argmax(1) != y)  # maybe by another restart


def test_sides_of_squares():
    sides = [side_of_square(query, 32, 32, 0.8, "linf") for query in (0, 10, 11, 51, 201, 501, 1001, 2001, 4001)]
    assert sides == [29, 29, 20, 14, 10, 7, 5, 4, 3]  # round(sqrt(0.8 / 2^k * 1024))
    assert [side_of_square(query, 32, 32, 0.8, "l2") for query in (0, 11, 4001)] == [29, 21, 3]
    assert side_of_square(0, 2, 9, 0.8, "linf") == 2 and side_of_square(4999, 2, 2, 0.8, "l2") == 2


@pytest.mark.parametrize("side", [1, 2, 3, 8, 13])
def test_bumps_have_norm_1_and_two_signs(side):
    bump = bump_pair(side)
    assert bump.norm().item() == pytest.approx(1) and bool((bump != 0).all())
    assert bool((bump[: side // 2] > 0).all() and (bump[side // 2 :] < 0).all())


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (9, 2), (14, 14), (5, 32)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_images_of_any_size(shape, norm):
    x = torch.rand(3, 2, *shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2 * shape[0] * shape[1], 4))
    y = net(x).argmax(1)
    x_adv = square(net, x, y, eps=0.05, norm=norm, num_queries=20)
    assert distance(x_adv, x, norm).max() <= 0.05 * (1 + 1e-5) and bool(x_adv.isfinite().all())
