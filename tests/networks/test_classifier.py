"""C: size, shapes, initial weights, padding, normalisation (spec 1.2)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from puat_fast.networks.classifier import Block, Classifier
from puat_fast.networks.layers import batch_norms

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("num_classes", "parameters"), [(10, 36_479_194), (100, 36_536_884)])
def test_full_size(num_classes, parameters):
    with torch.device("meta"):
        assert count(Classifier(num_classes)) == parameters


@pytest.mark.parametrize("num_classes", [2, 7])
def test_one_logit_per_class(num_classes):
    C = Classifier(num_classes, 10, 1)
    assert C(torch.rand(3, 3, 32, 32)).shape == (3, num_classes)
    assert C.features(torch.rand(3, 3, 32, 32)).shape == (3, 64)
    assert C.eval()(torch.rand(0, 3, 32, 32)).shape == (0, num_classes)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 32, 31), (2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match=r"x: shape .* expected N x 3 x 32 x 32"):
        Classifier(3, 10, 1)(torch.rand(shape))


def test_depth_must_be_6n_plus_4():
    with pytest.raises(ValueError, match="depth: 12"):
        Classifier(3, 12, 1)


def test_resolutions_and_projections():
    """Three groups at 32, 16, 8; a 1x1 shortcut where the width changes and nowhere else."""
    C, sizes = Classifier(3, 16, 2), []
    for group in C.layer:
        group.register_forward_hook(lambda m, i, out: sizes.append(tuple(sum(out).shape[1:])))
    C(torch.rand(2, 3, 32, 32))
    assert sizes == [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
    blocks = [block for group in C.layer for block in group.block]
    assert [block.shortcut is not None for block in blocks] == [True, False] * 3
    assert [block.stride for block in blocks] == [1, 1, 2, 1, 2, 1]


def test_no_projection_where_the_width_stays():
    with torch.device("meta"):
        assert Classifier(3, 10, 1).layer[0].block[0].shortcut is None  # 16 -> 16


def test_initial_weights():
    torch.manual_seed(0)
    C = Classifier(10, 16, 4)
    convs = [m for m in C.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 1 + 12 + 3
    for conv in convs:
        n, k, out = conv.weight.numel(), conv.kernel_size[0], conv.out_channels
        expected = (2 / (k * k * out)) ** 0.5
        assert conv.bias is None
        assert conv.weight.std().item() == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)
        assert abs(conv.weight.mean().item()) < 5 * expected / n**0.5
    for norm in batch_norms(C):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.01)
    bound = 256**-0.5
    assert (C.logits.bias == 0).all()
    assert 0.98 * bound < C.logits.weight.abs().max() <= bound
    assert C.logits.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("stride", "pad"), [(1, (1, 1, 1, 1)), (2, (0, 1, 0, 1))])
def test_block_is_the_formula_with_tensorflow_padding(stride, pad):
    torch.manual_seed(1)
    block, x = Block(4, 6, stride).eval().double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for norm in batch_norms(block):
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.weight)
    a = F.silu(block.batchnorm_0(x))
    r = F.conv2d(F.pad(a, pad), block.conv_0.weight, stride=stride)
    r = F.conv2d(F.silu(block.batchnorm_1(r)), block.conv_1.weight, padding=1)
    torch.testing.assert_close(sum(block(x)), r + F.conv2d(a, block.shortcut.weight, stride=stride))


def test_block_of_one_width_adds_its_raw_input():
    block, x = Block(4, 4, 1).eval(), torch.randn(2, 4, 8, 8)
    torch.nn.init.zeros_(block.conv_1.weight)
    assert torch.equal(sum(block(x)), x)


def test_normalisation_stands_in_front():
    torch.manual_seed(2)
    C, plain = Classifier(3, 10, 1, MEAN, STD).double().eval(), Classifier(3, 10, 1).double().eval()
    plain.load_state_dict(C.state_dict())
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(C(x), plain((x - mean) / std))


@pytest.mark.parametrize("casts", [["double"], ["double", "float", "double"], ["bfloat16", "double"]])
def test_a_cast_keeps_mean_and_std_exact(casts):
    C = Classifier(3, 10, 1, MEAN, STD)
    for cast in casts:
        C = copy.deepcopy(getattr(C, cast)())
    assert C.mean.flatten().tolist() == list(MEAN)
    assert C.std.flatten().tolist() == list(STD)
    assert C.mean.dtype == torch.float64


def test_normalisation_is_no_weight():
    """Checkpoints hold it once, as metadata, not among the tensors."""
    assert not {"mean", "std"} & set(Classifier(3, 10, 1).state_dict())


def test_momentum_1_takes_over_the_last_batch():
    C = Classifier(3, 10, 1)
    C.set_bn_momentum(1.0)
    C(torch.rand(4, 3, 32, 32))
    x, norm = torch.rand(4, 3, 32, 32), C.layer[0].block[0].batchnorm_0
    h = C.init_conv(x)
    C(x)
    torch.testing.assert_close(norm.running_mean, h.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, h.var((0, 2, 3)))  # the unbiased one
