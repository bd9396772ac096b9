"""A model whose gradients are masked by an input quantiser: what follows gradients finds nothing, and that is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from small_nets import EPS, heldout, trained
from torch import Tensor, nn

from puat_fast.attacks import AttackWarning, apgd_ce, apgd_t, autoattack, fab_t, pgd, square

N = 80
ZERO_GRADIENT = r"zero gradient at \d+ of \d+ starting points \(100\.0%\)"
quantised_nets = pytest.mark.parametrize("kind", ["relu", "bn"])


class Quantised(nn.Module):
    """A net that sees its images in the 17 gray levels that the digits have: the same to it, but flat in between."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Logits N x 10."""
        return self.net((x * 16).round() / 16)


def right(net: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((net(x).argmax(1) == y).sum())


@quantised_nets
@pytest.mark.parametrize("attack", [apgd_ce, apgd_t, pgd])
def test_following_gradients_finds_no_more_than_its_random_starts(attack, kind):
    net, (x, y) = trained(kind), heldout(N)
    masked = Quantised(net)
    assert torch.equal(masked(x), net(x))
    with pytest.warns(AttackWarning, match=ZERO_GRADIENT):
        found, at_once = (attack(masked, x, y, eps=EPS, num_steps=steps) for steps in (50, 1))
    assert torch.equal(found, at_once)
    moved = attack(net, x, y, eps=EPS, num_steps=50)
    clean = right(net, x, y)
    assert clean - right(masked, found, y) <= 4 < 12 <= clean - right(net, moved, y)


@quantised_nets
def test_fab_stays_where_it_is(kind):
    net, (x, y) = trained(kind), heldout(N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttackWarning)
        assert torch.equal(fab_t(Quantised(net), x, y, eps=EPS), x)
    assert right(net, fab_t(net, x, y, eps=EPS), y) < right(net, x, y) - 10


@quantised_nets
def test_square_breaks_it(kind):
    net, (x, y) = Quantised(trained(kind)), heldout(N)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = square(net, x, y, eps=EPS, num_queries=500)
    assert right(net, found, y) < right(net, x, y) - 15
    assert (found - x).abs().max() <= EPS + 1e-6


@quantised_nets
def test_autoattack_breaks_it_by_square_and_says_so_twice(kind):
    net, (x, y) = Quantised(trained(kind)), heldout(N)
    with pytest.warns(AttackWarning) as told:
        result = autoattack(net, x, y, EPS, iterations=20, num_queries=500)
    texts = [str(w.message) for w in told if issubclass(w.category, AttackWarning)]
    assert list(result.warnings) == texts
    assert any(text.startswith("apgd-ce: zero gradient at") and "100.0%" in text for text in texts)
    assert any(text.startswith("square took") and "masked" in text for text in texts)
    by_square = result.broken_by.count("square") / N
    assert by_square > 0.15 and by_square > 3 * (result.accuracy["clean"] - result.accuracy["fab-t"])


@quantised_nets
@pytest.mark.parametrize(
    "run",
    [
        lambda net, x, y: autoattack(net, x, y, EPS, iterations=50, num_queries=200),
        lambda net, x, y: pgd(net, x, y, eps=EPS),
        lambda net, x, y: pgd(net, x, y, eps=EPS, loss="kl"),
        lambda net, x, y: pgd(net, x, y, eps=EPS, loss="cw"),
    ],
)
def test_the_same_net_without_the_mask_gives_no_warning(run: Callable[..., object], kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(trained(kind), *heldout(N))


def test_pgd_does_not_warn_where_nothing_should_move():
    net, (x, y) = Quantised(trained("relu")), heldout(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for nothing in ({"eps": 0}, {"num_steps": 0}, {"step_size": 0}):
            pgd(net, x, y, **nothing)


def test_pgd_counts_the_images_without_gradient():
    net, (x, y) = trained("relu"), heldout(6)

    class Half(nn.Module):
        """Constant for the images whose first pixel is 0."""

        def forward(self, images: Tensor) -> Tensor:
            return net(images) * images[:, 0, 0, :1].round()

    x = x.clone()
    x[:, 0, 0, 0] = torch.tensor([0, 1, 1, 0, 1, 1.0])
    with pytest.warns(AttackWarning, match=r"^pgd: zero gradient at 2 of 6 starting points"):
        found = pgd(Half(), x, y, eps=EPS, random_start=False)
    assert [torch.equal(a, b) for a, b in zip(found, x, strict=True)] == [True, False, False, True, False, False]
