"""G and A: size, ranges, conditioning, initial weights (spec 1.2)."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from puat_fast.networks.attacker import Attacker
from puat_fast.networks.generator import CBNBlock, Generator
from puat_fast.networks.layers import ConditionalBatchNorm2d
from puat_fast.ops._upsample import upsample2


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_full_size():
    with torch.device("meta"):
        assert count(Generator(10)) == 4_822_531
        assert count(Attacker(10)) == 155_408


@pytest.mark.parametrize("training", [True, False])
def test_images_in_the_unit_range(training):
    torch.manual_seed(0)
    G = Generator(3, z_dim=8, width=8).train(training)
    G.to_rgb.weight.data[0], G.to_rgb.weight.data[1] = 1000, -1000  # saturates tanh on both sides
    x = G(torch.randn(5, 8), torch.tensor([0, 1, 2, 0, 1]))
    assert x.shape == (5, 3, 32, 32)
    assert 0 <= x.min() < 0.01 and 0.99 < x.max() <= 1


@pytest.mark.parametrize("net", ["G", "A"])
def test_the_label_enters_by_the_conditional_norms(net):
    torch.manual_seed(0)
    module = (Generator(3, 8, 8) if net == "G" else Attacker(3, 8)).eval()
    z = torch.randn(2, 8)
    a, b = module(z, torch.tensor([0, 0])), module(z, torch.tensor([1, 1]))
    assert torch.equal(a, b)  # gains 1, biases 0: all classes alike at first
    for cbn in module.modules():
        if isinstance(cbn, ConditionalBatchNorm2d):
            cbn.gain.data[1] *= 2
    changed = module(z, torch.tensor([0, 1]))
    torch.testing.assert_close(changed[0], a[0])
    assert not torch.allclose(changed[1], a[1], atol=1e-4)


def test_conditional_norm_is_the_formula():
    cbn, x, y = ConditionalBatchNorm2d(3, 2).double(), torch.randn(4, 2, 5, 5).double(), torch.tensor([2, 0, 1, 2])
    torch.nn.init.normal_(cbn.gain)
    torch.nn.init.normal_(cbn.bias)
    xhat = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(cbn(x, y), cbn.gain[y][..., None, None] * xhat + cbn.bias[y][..., None, None])
    assert cbn.bn.momentum == 0.1


@pytest.mark.parametrize("mode", ["train", "frozen", "eval"])
def test_relu_up_is_the_unfused_norm(mode):
    cbn, x, y = ConditionalBatchNorm2d(3, 2), torch.randn(4, 2, 5, 5), torch.tensor([2, 0, 1, 2])
    torch.nn.init.normal_(cbn.gain)
    unfused = deepcopy(cbn)
    for module in (cbn, unfused):
        module.train(mode != "eval")
        module.bn.update_stats = mode != "frozen"
    for _ in range(2):
        expected = F.interpolate(F.relu(unfused(x, y)), scale_factor=2, mode="bilinear", align_corners=False)
        torch.testing.assert_close(cbn.relu_up(x, y, upsample=True), expected)
        torch.testing.assert_close(cbn.relu_up(x, y, upsample=False), F.relu(unfused(x, y)))
    assert cbn.state_dict().keys() == unfused.state_dict().keys()
    for name, buffer in cbn.named_buffers():  # num_batches_tracked too
        torch.testing.assert_close(buffer, unfused.get_buffer(name))


@pytest.mark.parametrize("upsample", [True, False])
def test_block_is_the_formula(upsample):
    torch.manual_seed(0)
    block, h, y = CBNBlock(4, 6, 3, upsample).double(), torch.randn(2, 4, 4, 4).double(), torch.tensor([0, 2])

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) if upsample else x

    r = block.conv1(up(F.relu(block.cbn1(h, y))))
    r = block.conv2(F.relu(block.cbn2(r, y)))
    torch.testing.assert_close(block(h, y), r + block.shortcut(up(h)))
    assert block.conv1.bias is not None and block.conv2.bias is not None and block.shortcut.bias is not None


def test_initial_weights_of_g():
    """Xavier in the first and last layer, torch's default in the blocks (spec 1.2)."""
    torch.manual_seed(0)
    G = Generator(10, z_dim=64, width=32)
    for layer, fans in ((G.linear, 64 + 512), (G.to_rgb, 32 + 3)):
        bound = (6 / fans) ** 0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    bound = (1 / (32 * 9)) ** 0.5
    assert 0.98 * bound < G.blocks[1].conv1.weight.abs().max() <= bound
    assert G.bn.affine and not G.blocks[0].cbn1.bn.affine
    assert G.bn.momentum == 0.1


@pytest.mark.parametrize("clip", [0.1, 0.5, 0.0])
def test_the_latent_moves_by_at_most_clip(clip):
    torch.manual_seed(0)
    A = Attacker(3, 8, clip)
    torch.nn.init.normal_(A.linear_out.weight, std=100)  # saturates tanh
    z = torch.randn(16, 8, dtype=torch.float64)
    moved = (A.double()(z, torch.randint(3, (16,))) - z).abs().max().item()
    assert moved == pytest.approx(clip, rel=1e-3)
    assert moved <= clip + 1e-12


def test_the_attacker_starts_from_z():
    A = Attacker(3, 8)
    torch.nn.init.zeros_(A.linear_out.weight)
    torch.nn.init.zeros_(A.linear_out.bias)
    z = torch.randn(4, 8)
    assert torch.equal(A(z, torch.tensor([0, 1, 2, 0])), z)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 4), (5, 2)])
def test_upsample2_is_bilinear_interpolation(size: tuple[int, int]) -> None:
    """Values and gradients of F.interpolate, and the layout of the input."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(2, 3, 2 * size[0], 2 * size[1], dtype=torch.float64)
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = upsample2(ours)
    plain = F.interpolate(expected, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, plain)
    (out * weight).sum().backward()
    (plain * weight).sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad)
    assert out.is_contiguous(memory_format=torch.channels_last)
