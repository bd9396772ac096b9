"""APGD: equal to the reference implementation, and as strong where batches are shared."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_attacks import accuracy, distance, reference
from small_nets import EPS, heldout, trained

from puat_fast.attacks.autoattack import apgd_ce, apgd_t
from puat_fast.attacks.autoattack.apgd import checkpoints, dlr_targeted

ATTACKS = {"apgd-ce": apgd_ce, "apgd-t": apgd_t}
RADII = {"linf": EPS, "l2": 0.5}


@pytest.mark.parametrize("kind", ["relu", "bn"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_faithful_is_the_reference_bit_for_bit(name, norm, kind):
    net, (x, y) = trained(kind), heldout(30)
    theirs = reference(name, net, x, y, eps=RADII[norm], norm=norm)
    ours = ATTACKS[name](net, x, y, eps=RADII[norm], norm=norm, faithful=True)
    assert torch.equal(ours, theirs)
    assert 0 < accuracy(net, ours, y) < accuracy(net, x, y)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_restarts_and_seed_of_faithful_too(name):
    net, (x, y) = trained("bn"), heldout(8)
    theirs = reference(name, net, x, y, eps=EPS, norm="linf", n_restarts=2, seed=5)
    assert torch.equal(ATTACKS[name](net, x, y, eps=EPS, restarts=2, seed=5, faithful=True), theirs)


def test_checkpoints_of_100_steps_are_the_papers():
    # p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06)
    assert [step for step, _ in checkpoints(100)] == [22, 41, 57, 70, 80, 87, 93, 99]
    assert checkpoints(1) == [(1, 1)] and [step for step, _ in checkpoints(10)] == [2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_dlr_does_not_see_scale_and_shift_and_is_the_margin_below_4_classes():
    z = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0]], dtype=torch.float64)
    y, t = torch.tensor([0]), torch.tensor([1])
    expected = -(3 - 1) / (3 - (1 + 0) / 2)
    assert dlr_targeted(z, y, t).item() == pytest.approx(expected)
    assert dlr_targeted(7 * z + 3, y, t).item() == pytest.approx(expected)
    for k in (2, 3):
        assert dlr_targeted(z[:, :k], y, t).item() == -2


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fast_is_as_strong_in_the_ball_and_in_the_range(name, norm):
    net, (x, y) = trained("bn"), heldout(50)
    x_adv = ATTACKS[name](net, x, y, eps=RADII[norm], norm=norm, batch_size=32)
    theirs = ATTACKS[name](net, x, y, eps=RADII[norm], norm=norm, faithful=True)
    assert abs(accuracy(net, x_adv, y) - accuracy(net, theirs, y)) <= 1 / 50 + 1e-9
    moved = distance(x_adv, x, norm)
    assert moved.max() <= RADII[norm] * (1 + 1e-5) and x_adv.min() >= 0 and x_adv.max() <= 1
    wrong = net(x_adv).argmax(1) != y
    clean_wrong = net(x).argmax(1) != y
    assert torch.equal(moved > 0, wrong & ~clean_wrong)  # what is not fooled, or was wrong, comes back as it is


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_fast_does_not_depend_on_the_batch(name):
    net, (x, y) = trained("bn"), heldout(24)
    net, x = copy.deepcopy(net).double(), x.double()  # rounding is no excuse
    attack = {"eps": EPS, "num_steps": 20, "restarts": 2}
    whole = ATTACKS[name](net, x, y, batch_size=24, **attack)
    for rows, batch_size in ((24, 5), (7, 250)):
        part = ATTACKS[name](net, x[:rows], y[:rows], batch_size=batch_size, **attack)
        # the image that fools it may be that of another target or restart
        assert torch.equal(net(part).argmax(1) == y[:rows], net(whole[:rows]).argmax(1) == y[:rows])
    other = ATTACKS[name](net, x, y, batch_size=24, **attack, seed=1)
    assert not torch.equal(whole, other)
