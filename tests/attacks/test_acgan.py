"""The AC-GAN's networks: published sizes, shapes, order of operations, names; and how its images are made smaller."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator, official_acgan_name, shrink

N, K = 5, 3
Y = torch.tensor([0, 1, 2, 0, 1])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_full_size_networks_have_the_published_number_of_parameters():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in net.parameters()) for net in (AcGenerator(10), AcDiscriminator(10))]
    assert sizes == [3_576_680, 2_855_808]


def test_acgan_shapes_and_ranges():
    torch.manual_seed(0)
    generator, discriminator = AcGenerator(K, 12, width=2).eval(), AcDiscriminator(K, width=2).eval()
    x = generator(torch.randn(N, 12), Y)
    validity, log_probs = discriminator(x)
    assert x.shape == (N, 3, 64, 64) and 0 <= x.min() and x.max() <= 1
    assert validity.shape == (N,) and 0 <= validity.min() and validity.max() <= 1
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(N))
    assert log_probs.shape == (N, K + 1)
    with pytest.raises(ValueError, match=r"^x: shape \(5, 3, 32, 32\)"):
        discriminator(shrink(x))


def test_noise_times_embedding_and_no_norm_in_the_stem():
    torch.manual_seed(0)
    generator = AcGenerator(K, 12, width=2).eval()
    z = torch.randn(N, 12)
    h = torch.einsum("nc,cokl->nokl", z * generator.embedding.weight[Y], generator.stem.weight).relu()
    torch.testing.assert_close(generator(z, Y), generator.to_rgb(generator.blocks(h)).tanh() / 2 + 0.5)


def test_dropout_stands_in_the_first_three_blocks():
    assert [block.dropout.p for block in AcDiscriminator(K, width=2).blocks] == [0.5, 0.5, 0.5, 0.0]


def test_shrink_is_a_mean_of_2x2_or_antialiased():
    x = drawn(2, 3, 64, 64)
    mean = x.view(2, 3, 32, 2, 32, 2).mean((3, 5))
    torch.testing.assert_close(shrink(x), mean, rtol=1e-12, atol=1e-12)
    triangle = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8  # the inner pixels' weights along each axis
    inner = F.conv2d(x.flatten(0, 1)[:, None], torch.outer(triangle, triangle)[None, None], stride=2, padding=1)
    smooth = shrink(x, antialias=True)
    torch.testing.assert_close(smooth[..., 1:-1, 1:-1], inner.view(2, 3, 32, 32)[..., 1:-1, 1:-1])
    assert (smooth - mean).abs().max() > 0.1
    assert shrink(x, 64) is x and shrink(smooth, antialias=True) is smooth


def official_acgan_names() -> dict[str, set[str]]:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    g = {"embedding.weight", "layer1.0.weight", "layer5.0.weight"}
    g |= {f"layer{i}.0.weight" for i in (2, 3, 4)} | {f"layer{i}.1.{n}" for i in (2, 3, 4) for n in norm}
    d = {"validity_layer.0.weight", "label_layer.0.weight"}
    d |= {f"layer{i}.0.weight" for i in (1, 2, 3, 4)} | {f"layer{i}.1.{n}" for i in (1, 2, 3, 4) for n in norm}
    return {"G": g, "D": d}


@pytest.mark.parametrize(("net", "module"), [("G", AcGenerator(K, width=1)), ("D", AcDiscriminator(K, width=1))])
def test_official_names_cover_the_networks(net, module):
    ours = {official_acgan_name(net, name) for name in official_acgan_names()[net]}
    assert ours == set(module.state_dict())
