"""The AC-GAN whose latent space GPGD and USong search (spec 3): networks only.

It is independent of PUAT's own G and D; one is needed per dataset. Neither weights nor a training script were
published: `train --method acgan` (engine/acgan.py) makes one, and weights of the official layout are loaded with
`official_acgan_name`.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast.networks.layers import BatchNorm2d


class UpBlock(nn.Module):
    """ReLU(BN(ConvT4x4(h))), stride 2, no bias: twice the resolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
        self.bn = BatchNorm2d(channels_out)

    def forward(self, h: Tensor) -> Tensor:
        """h: N x channels_in x H x W -> N x channels_out x 2H x 2W."""
        return F.relu(self.bn(self.conv(h)))


class AcGenerator(nn.Module):
    """Gen(z, y): z N x z_dim, y N -> images in [0,1], N x 3 x 64 x 64; `shrink` makes them 32 x 32.

    z times the label's embedding, elementwise -> ConvT to 8 width x 4 x 4, ReLU (no BN) -> up-blocks to 4, 2 and
    1 width -> ConvT to 3 -> tanh * 0.5 + 0.5. No biases. With the defaults and K = 10: 3,576,680 parameters.
    """

    def __init__(self, num_classes: int, z_dim: int = 100, width: int = 64) -> None:
        super().__init__()
        self.num_classes, self.z_dim, self.width = num_classes, z_dim, width
        self.embedding = nn.Embedding(num_classes, z_dim)
        self.stem = nn.ConvTranspose2d(z_dim, 8 * width, 4, bias=False)
        self.blocks = nn.Sequential(*(UpBlock(2 * n * width, n * width) for n in (4, 2, 1)))
        self.to_rgb = nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1, bias=False)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """z: N x z_dim, y: N class indices -> N x 3 x 64 x 64 in [0,1]."""
        h = F.relu(self.stem((z * self.embedding(y))[:, :, None, None]))
        return self.to_rgb(self.blocks(h)).tanh() * 0.5 + 0.5


class DownBlock(nn.Module):
    """Dropout2d(LeakyReLU_0.2(BN(conv4x4(x)))), stride 2, no bias: half the resolution."""

    def __init__(self, channels_in: int, channels_out: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
        self.bn = BatchNorm2d(channels_out)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: N x channels_in x H x W -> N x channels_out x H/2 x W/2."""
        return self.dropout(F.leaky_relu(self.bn(self.conv(x)), 0.2))


class AcDiscriminator(nn.Module):
    """AC-GAN's D(x) -> (validity in [0,1], log-probabilities of K + 1 classes; class K is "fake").

    (x - 0.5) / 0.5 -> four down-blocks to 1, 2, 4, 8 width, dropout 0.5 in the first three -> two 4x4 convolutions:
    sigmoid validity, log-softmax label. No biases. With the defaults and K = 10: 2,855,808 parameters.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.width = width
        channels = (3, width, 2 * width, 4 * width, 8 * width)
        self.blocks = nn.Sequential(
            *(DownBlock(channels[i], channels[i + 1], dropout=0.5 if i < 3 else 0.0) for i in range(4))
        )
        self.validity = nn.Conv2d(8 * width, 1, 4, bias=False)
        self.label = nn.Conv2d(8 * width, num_classes + 1, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: N x 3 x 64 x 64 in [0,1] -> N, N x (K + 1). Raises ValueError on another shape."""
        if x.shape[1:] != (3, 64, 64):
            raise ValueError(f"x: shape {tuple(x.shape)}, expected N x 3 x 64 x 64")
        h = self.blocks((x - 0.5) / 0.5)
        return self.validity(h).flatten().sigmoid(), self.label(h).flatten(1).log_softmax(1)


def told_class(label_log_probs: Tensor) -> Tensor:
    """Which of the K classes D's label head tells, N x (K + 1) -> N: whether it also says "fake" is not asked."""
    return label_log_probs[:, :-1].argmax(1)


def shrink(images: Tensor, size: int = 32, antialias: bool = False) -> Tensor:
    """Images larger than size x size resized to it, bilinear; others as they are. Differentiable.

    antialias False: no filter, so 64 -> 32 is the mean of each 2 x 2 block: torchvision's Resize of tensors before
    0.17. True: a triangle filter of twice the support, its default since. images: N x 3 x H x W.
    """
    if max(images.shape[2:]) <= size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias)


_OFFICIAL_NAMES = {
    "G": ((r"^layer1\.0\.", "stem."), (r"^layer5\.0\.", "to_rgb.")),
    "D": ((r"^validity_layer\.0\.", "validity."), (r"^label_layer\.0\.", "label.")),
}


def official_acgan_name(net: str, name: str) -> str:
    """This module's name of an official parameter or buffer; net is G or D.

    `official_acgan_name("G", "layer2.1.running_mean") == "blocks.0.bn.running_mean"`.
    """
    first = 2 if net == "G" else 1  # G's layer1 is the stem
    for pattern, replacement in _OFFICIAL_NAMES[net]:
        name = re.sub(pattern, replacement, name)
    return re.sub(
        r"^layer(\d)\.([01])\.", lambda m: f"blocks.{int(m[1]) - first}.{'bn' if m[2] == '1' else 'conv'}.", name
    )
