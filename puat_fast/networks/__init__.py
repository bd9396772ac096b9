"""The four networks of PUAT, and the teacher C'."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import nn

from puat_fast.config import Config, FastConfig
from puat_fast.networks.attacker import Attacker
from puat_fast.networks.augment import Augment
from puat_fast.networks.classifier import Classifier
from puat_fast.networks.discriminator import Discriminator, DownBlock
from puat_fast.networks.generator import CBNBlock, Generator
from puat_fast.networks.layers import Compiled
from puat_fast.noise import Noise

__all__ = ["Attacker", "Augment", "Classifier", "Discriminator", "Generator", "Networks", "build_classifier"]


@dataclass
class Networks:
    """G, D, C, A of the paper, and C_ema, the teacher C' (EMA of C)."""

    G: Generator
    D: Discriminator
    C: Classifier
    A: Attacker
    C_ema: Classifier

    def __post_init__(self) -> None:
        self.skip_weight_grads = True  # of networks that are not trained; false: as the official code

    @classmethod
    def build(cls, config: Config, num_classes: int, noise: Noise) -> Networks:
        """Freshly initialised networks on noise's device and dtype; the global RNG is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            C = build_classifier(config, num_classes, noise)
            G = Generator(num_classes, config.gan.z_dim, config.gan.width)
            D = Discriminator(num_classes, config.gan.width, config.gan.sn_per_class_lookup)
            A = Attacker(num_classes, config.gan.z_dim, config.attacker.clip)
        nets: tuple[nn.Module, ...] = (G, D, C, A)
        for net in nets:  # channels_last: the layout that convolutions run fastest in, on CPU and GPU
            net.to(noise.device, noise.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(G=G, D=D, C=C, A=A, C_ema=copy_classifier(C))

    def items(self) -> Iterator[tuple[str, Compiled]]:
        """(name, network) of the five."""
        return ((f.name, getattr(self, f.name)) for f in fields(self))

    def use(self, fast: FastConfig, conv_dtype: torch.dtype | None) -> None:
        """Which exact short cuts the networks take, and the dtype of the convolutions of C, G and D (A's are tiny)."""
        self.skip_weight_grads = fast.skip_weight_grads
        self.D.batched = fast.batch_disc
        for module in (m for _, net in self.items() for m in net.modules()):
            if isinstance(module, DownBlock):
                module.pool_conv, module.commute = fast.pool_conv, fast.commute
            elif isinstance(module, CBNBlock):
                module.commute = fast.commute
        for C in (self.C, self.C_ema):
            C.set_fold_bn(fast.fold_bn)
        for net in (self.C, self.C_ema, self.G, self.D):
            net.conv_dtype = conv_dtype

    @contextmanager
    def training_only(self, name: str) -> Iterator[None]:
        """Inside, only the parameters of network `name` require gradients: no other weight gradient is computed."""
        for other, net in self.items():
            net.requires_grad_(other == name or not (self.skip_weight_grads or other == "C_ema"))
        try:
            yield
        finally:
            for _, net in self.items():
                net.requires_grad_(False)


def build_classifier(config: Config, num_classes: int, noise: Noise | None = None) -> Classifier:
    """C as configured; with `noise`, train mode augments, unless the loader does.

    Weights are drawn from torch's global generator.
    """
    a = config.augment
    augment = None
    if noise is not None and a.where == "classifier" and (a.crop_pad or a.flip or a.rotate_deg):
        augment = Augment(noise, a.crop_pad, a.flip, a.rotate_deg, a.scope)
    c, d = config.classifier, config.data
    return Classifier(num_classes, c.depth, c.width, d.mean, d.std, augment)


def copy_classifier(C: Classifier) -> Classifier:
    """A copy with its own weights and buffers that draws its augmentation from the same noise."""
    noise = {id(C.augment.noise): C.augment.noise} if C.augment is not None else {}
    return copy.deepcopy(C, noise)
