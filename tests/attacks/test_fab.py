"""FAB: its projections, and as strong as the reference implementation."""

from __future__ import annotations

import pytest
import torch
from reference_attacks import accuracy, distance, reference
from small_nets import EPS, heldout, trained

from puat_fast.attacks.autoattack import fab_t
from puat_fast.attacks.autoattack.fab import to_plane

RADII = {"linf": EPS, "l2": 0.5}


def plane(scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """20 points of the box, of which some lie on its sides, normals, and how far <w, point> is from the plane."""
    g = torch.Generator().manual_seed(0)
    point, w = torch.rand(20, 30, generator=g).double(), torch.randn(20, 30, generator=g).double()
    point[:5] = point[:5].round()
    w[:, :2] = 0
    return point, w, scale * torch.randn(20, generator=g).double()


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_is_the_references(norm, scale):
    library = pytest.importorskip("pyautoattack.fab_projections", reason="pyautoattack is not installed")
    project = {"linf": library.projection_linf, "l2": library.projection_l2}[norm]
    point, w, offset = (part.float() for part in plane(scale))
    theirs = project(point, w, (w * point).sum(1) - offset)
    torch.testing.assert_close(to_plane(point, w, offset, norm), theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_lies_on_the_plane_and_nothing_nearer_does(norm, scale):
    point, w, offset = plane(scale)
    delta = to_plane(point, w, offset, norm)
    box = (point + delta).clamp(0, 1)
    torch.testing.assert_close(box, point + delta)
    towards = -offset.sign()[:, None] * w
    corner = torch.where(towards > 0, 1.0, 0.0).double().where(w != 0, point)
    reached = ((w * delta).sum(1) + offset).abs() < 1e-6
    assert torch.equal(~reached, ((w * (corner - point)).sum(1).abs() < offset.abs()))
    torch.testing.assert_close((point + delta)[~reached], corner[~reached])
    # of all moves within a ball a little smaller, the best one misses the plane
    radius = 0.999 * distance(delta, torch.zeros_like(delta), norm)
    if norm == "linf":
        best = (point + radius[:, None] * towards.sign()).clamp(0, 1) - point
        assert ((w * best).sum(1).abs() < offset.abs()).all()
    else:  # optimality: delta is proportional to w where no side of the box is in the way
        inside = ((point + delta) > 1e-9) & ((point + delta) < 1 - 1e-9) & (w != 0)
        ratio = (delta / w).where(inside, torch.nan)[reached]
        spread = ratio - ratio.nanmedian(dim=1, keepdim=True).values
        assert spread.nan_to_num().abs().max() < 1e-6


def test_projection_of_tiny_and_zero_normals():
    point, w, offset = plane(1.0)
    for norm in ("linf", "l2"):
        expected = to_plane(point, w, offset, norm)
        torch.testing.assert_close(to_plane(point, 1e-30 * w, 1e-30 * offset, norm), expected)
        assert to_plane(point, 0 * w, offset, norm).abs().max() == 0
        assert to_plane(point, w, 0 * offset, norm).abs().max() == 0


@pytest.mark.parametrize("kind, restarts", [("relu", 1), ("bn", 1), ("relu", 2)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_both_ways_fool_what_the_reference_fools(norm, kind, restarts):
    net, (x, y) = trained(kind), heldout(20)
    attack = {"eps": RADII[norm], "norm": norm}
    theirs = reference("fab-t", net, x, y, n_restarts=restarts, n_iter=20, **attack)
    for faithful in (True, False):
        ours = fab_t(net, x, y, restarts=restarts, num_steps=20, faithful=faithful, **attack)
        assert abs(accuracy(net, ours, y) - accuracy(net, theirs, y)) <= 1 / 20 + 1e-9 < accuracy(net, x, y)
        assert distance(ours, x, norm).max() <= RADII[norm] and ours.min() >= 0 and ours.max() <= 1
        if faithful:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
