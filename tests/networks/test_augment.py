"""C's augmentation: what can come out, how often, per image or per batch, and its gradient (spec 1.8)."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import chisquare
from torch import Tensor

from puat_fast.networks import augment as augment_module
from puat_fast.networks.augment import Augment
from puat_fast.networks.classifier import Classifier
from puat_fast.noise import Noise
from puat_fast.testing import RecordedNoise


def crops(image: Tensor, pad: int = 4, flip: bool = True) -> Tensor:
    """All (2 pad + 1)^2 crops of a padded image, then all of them flipped: M x C x H x W, by slicing alone."""
    padded, (h, w) = F.pad(image, (pad,) * 4), image.shape[1:]
    plain = torch.stack([padded[:, t : t + h, left : left + w] for t, left in product(range(2 * pad + 1), repeat=2)])
    return torch.cat([plain, plain.flip(3)]) if flip else plain


def which(out: Tensor, candidates: Tensor) -> Tensor:
    """For each image the candidate it equals; fails where there is none."""
    distance = torch.cdist(out.flatten(1), candidates.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert (distance.min(1).values == 0).all(), "an output is no crop or flip of the input"
    return distance.argmin(1)


def marked(size: int, channels: int = 1) -> Tensor:
    """An image in which every pixel is unlike every other."""
    return torch.arange(1.0, channels * size * size + 1).view(channels, size, size)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_every_output_is_a_crop_or_its_flip(scope):
    image = marked(32, 3)
    out = Augment(Noise(0), 4, True, 0, scope)(image.expand(40, -1, -1, -1))
    chosen = which(out, crops(image))
    assert len(chosen.unique()) == 1 if scope == "batch" else len(chosen.unique()) > 20


def test_offsets_and_flips_are_uniform():
    """chi-square over all 162 outcomes: they are equally likely, offsets and flip independent."""
    image = marked(8)
    out = Augment(Noise(1), 4, True, 0, "image")(image.expand(16200, -1, -1, -1))
    counts = np.bincount(which(out, crops(image)).numpy(), minlength=162)
    assert chisquare(counts).pvalue > 1e-3
    assert chisquare(counts.reshape(2, 81).sum(1)).pvalue > 1e-3


def test_outcomes_of_whole_batches_are_uniform():
    image, augment = marked(8), Augment(Noise(2), 4, True, 0, "batch")
    chosen = torch.cat([which(augment(image[None]), crops(image)) for _ in range(1620)])
    counts = np.bincount(chosen.numpy(), minlength=162).reshape(2, 9, 9)
    for axes in ((1, 2), (0, 2), (0, 1)):
        assert chisquare(counts.sum(axes)).pvalue > 1e-3


def test_extreme_draws_stay_inside():
    """u next to 1 is the last offset, u = 0 the first."""
    image, almost = marked(8), np.nextafter(np.float32(1), np.float32(0)).reshape(1, 1)
    for u, top_left in ((np.zeros((1, 1)), 0), (almost, 80)):
        noise = RecordedNoise({"augment/top": [u], "augment/left": [u]})
        out = Augment(noise, 4, False, 0, "image")(image[None])
        assert which(out, crops(image, flip=False)).item() == top_left


def test_flip_alone_and_crop_alone():
    image = marked(8)
    chosen = which(Augment(Noise(0), 0, True, 0, "image")(image.expand(64, -1, -1, -1)), crops(image, 0))
    assert set(chosen.tolist()) == {0, 1}
    chosen = which(Augment(Noise(0), 2, False, 0, "image")(image.expand(400, -1, -1, -1)), crops(image, 2, False))
    assert set(chosen.tolist()) == set(range(25))


def test_each_call_draws_anew():
    image, augment = marked(8), Augment(Noise(0), 4, True, 0, "batch")
    chosen = {which(augment(image[None]), crops(image)).item() for _ in range(20)}
    assert len(chosen) > 10


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradient_is_that_of_an_explicit_crop(scope):
    torch.manual_seed(0)
    x, weight = torch.rand(6, 3, 32, 32, dtype=torch.float64), torch.randn(6, 3, 32, 32, dtype=torch.float64)
    marks = marked(32).expand(6, -1, -1, -1)
    chosen = which(Augment(Noise(3), 4, True, 0, scope)(marks), crops(marks[0]))  # the same stream: the same draws
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = Augment(Noise(3), 4, True, 0, scope)(a)
    explicit = []
    for i, k in enumerate(chosen.tolist()):
        flip, (top, left) = k // 81, divmod(k % 81, 9)
        crop = F.pad(b[i], (4,) * 4)[:, top : top + 32, left : left + 32]
        explicit.append(crop.flip(2) if flip else crop)
    explicit = torch.stack(explicit)
    assert torch.equal(out, explicit)
    (out * weight).sum().backward()
    (explicit * weight).sum().backward()
    assert torch.equal(a.grad, b.grad)
    assert (a.grad == 0).any()  # pixels that were cut off


def rotated_by(u: float, image: Tensor, degrees: float = 15) -> Tensor:
    noise = RecordedNoise({"augment/angle": [np.full((1, 1), u)]})
    return Augment(noise, 0, False, degrees, "image")(image[None])[0]


def test_rotation_takes_nearest_values_and_fills_with_zero():
    image = marked(32, 3)
    for u in (0.0, 0.3, 1.0):
        out = rotated_by(u, image)
        assert set(out.flatten().tolist()) <= set(image.flatten().tolist()) | {0.0}
    corners = rotated_by(1.0, torch.ones(1, 32, 32))[0]
    assert corners[0, 0] == corners[0, -1] == corners[-1, 0] == corners[-1, -1] == 0
    assert (corners[8:24, 8:24] == 1).all()


def test_the_middle_of_the_range_does_not_rotate():
    image = marked(32, 3)
    assert torch.equal(rotated_by(0.5, image), image)


@pytest.mark.parametrize("u", [0.0, 0.25, 1.0])
def test_rotation_is_pillows(u):
    torch.manual_seed(0)
    image = (torch.rand(32, 32) * 255).byte()
    angle = (2 * u - 1) * 15
    out = rotated_by(u, image[None].float())[0]
    pillow = [torch.tensor(np.array(Image.fromarray(image.numpy()).rotate(s * angle))).float() for s in (1, -1)]
    agreement = max((out == p).float().mean().item() for p in pillow)
    assert agreement > 0.97  # pixels whose source is halfway between two may round otherwise


def test_angles_are_uniform_in_the_range(monkeypatch):
    drawn = []
    op = augment_module.augment
    monkeypatch.setattr(augment_module, "augment", lambda x, **k: drawn.append(k["cos_sin"]) or op(x, **k))
    Augment(Noise(0), 0, False, 15, "image")(torch.rand(2000, 1, 4, 4))
    cos, sin = drawn[0].unbind(1)
    degrees = torch.atan2(sin, cos) * 180 / math.pi
    assert degrees.min() >= -15 and degrees.max() <= 15
    assert chisquare(torch.histc(degrees, 10, -15, 15).numpy()).pvalue > 1e-3


def test_eval_mode_does_not_augment():
    noise = Noise(0)
    C = Classifier(3, 10, 1, augment=Augment(noise, 4, True, 0, "image")).eval()
    x, state = torch.rand(2, 3, 32, 32), noise.generator.get_state()
    assert torch.equal(C(x), C(x))
    assert torch.equal(noise.generator.get_state(), state)


def test_train_mode_augments_anew_in_every_forward():
    C, seen = Classifier(3, 10, 1, augment=Augment(Noise(0), 4, True, 0, "batch")), []
    C.init_conv.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    x = torch.rand(2, 3, 32, 32)
    C(x), C(x)
    assert not torch.equal(seen[0], seen[1])


def test_padding_is_black_before_normalisation():
    mean = (0.5, 0.5, 0.5)
    C, seen = Classifier(3, 10, 1, mean, augment=Augment(Noise(0), 4, True, 0, "image")), []
    C.init_conv.register_forward_hook(lambda m, inputs, out: seen.append(inputs[0]))
    C(torch.ones(16, 3, 32, 32))
    assert set(seen[0].flatten().tolist()) == {-0.5, 0.5}
