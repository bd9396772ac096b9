"""The official PUAT step (stage 2) as published, in our words: what a speed-up is measured against.

`verbatim` is what the code of August 2024 does on a GPU: NCHW, torch's default precision (convolutions in TF32), D's
class embedding looked up class by class under spectral norm's hooks, weight gradients that nobody reads, C run on
unlabelled images that are then cut off, constants copied to the device in every forward, a host read for every logged
value, and torch.cuda.empty_cache() after every PGD step. `eager` is the same without empty_cache. Loading is left out
of both. The numbers are those of the preset official-v1 (tests/test_benchmarks.py holds the two against each other).

Plain torch on purpose: nothing of puat_fast's networks, losses or optimisers, only its draws and batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from puat_fast.config import Config
from puat_fast.data.batch import DiscBatch, SemiBatch, StepBatch
from puat_fast.methods import Scalars
from puat_fast.networks import Networks
from puat_fast.noise import Noise

BASELINES = ("verbatim", "eager")


class Normalise:
    """(x - mean) / std with constants that live on the host."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        self.mean, self.std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (mean, std))

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean.to(x.device)) / self.std.to(x.device)


# -- C ----------------------------------------------------------------------------------------------------------------


class WideBlock(nn.Module):
    """Block of the wide residual network with SiLU in place and the padding as an operation of its own."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.batchnorm_0 = nn.BatchNorm2d(channels_in, momentum=0.01)
        self.conv_0 = nn.Conv2d(channels_in, channels_out, 3, stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(channels_out, momentum=0.01)
        self.conv_1 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        changes = channels_in != channels_out
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.batchnorm_0(x), inplace=True)
        v = F.pad(a, (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1))
        r = self.conv_1(F.silu(self.batchnorm_1(self.conv_0(v)), inplace=True))
        return torch.add(x if self.shortcut is None else self.shortcut(a), r)


class WideGroup(nn.Module):
    def __init__(self, num_blocks: int, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        rest = (WideBlock(channels_out, channels_out, 1) for _ in range(num_blocks - 1))
        self.block = nn.Sequential(WideBlock(channels_in, channels_out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class WideResNet(nn.Module):
    """C: augmentation (train mode; one draw per batch), normalisation, WRN."""

    def __init__(self, num_classes: int, config: Config, noise: Noise) -> None:
        super().__init__()
        depth, width = config.classifier.depth, config.classifier.width
        n, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.noise, self.augment = noise, config.augment
        self.normalise = Normalise(config.data.mean, config.data.std, noise.dtype)
        self.init_conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.layer = nn.Sequential(*(WideGroup(n, widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(3)))
        self.batchnorm = nn.BatchNorm2d(widths[3], momentum=0.01)
        self.logits = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.init_conv(self.normalise(self._augmented(x) if self.training else x)))
        return self.logits(F.avg_pool2d(F.silu(self.batchnorm(h), inplace=True), 8).flatten(1))

    def _augmented(self, x: Tensor) -> Tensor:
        def draw(name: str) -> float:
            return float(self.noise.uniform(f"augment/{name}", (1, 1)))

        pad = self.augment.crop_pad
        if pad:
            top, left = int(draw("top") * (2 * pad + 1)), int(draw("left") * (2 * pad + 1))
            x = F.pad(x, (pad,) * 4)[:, :, top : top + 32, left : left + 32]
        if self.augment.flip and draw("flip") < 0.5:
            x = x.flip(3)
        if self.augment.rotate_deg:
            angle = math.radians((2 * draw("angle") - 1) * self.augment.rotate_deg)
            cos, sin = math.cos(angle), math.sin(angle)
            theta = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]], dtype=x.dtype).to(x.device)
            grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return x


# -- G and A ----------------------------------------------------------------------------------------------------------


class ConditionalNorm(nn.Module):
    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, affine=False)
        self.gain, self.bias = (nn.Parameter(torch.empty(num_classes, channels)) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gain, bias = (F.embedding(y, table)[:, :, None, None].expand(x.shape) for table in (self.gain, self.bias))
        return gain * self.bn(x) + bias


class UpBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, num_classes: int, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.cbn1 = ConditionalNorm(num_classes, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.cbn2 = ConditionalNorm(num_classes, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        r = F.relu(self.cbn1(h, y))
        if self.upsample:
            size = (2 * h.shape[2], 2 * h.shape[3])
            h, r = (F.interpolate(t, size=size, mode="bilinear") for t in (h, r))
        return self.shortcut(h) + self.conv2(F.relu(self.cbn2(self.conv1(r), y)))


class ResNetGenerator(nn.Module):
    """G; its last step undoes a normalisation by 0.5, with constants that live on the host."""

    def __init__(self, num_classes: int, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.gan.width
        self.half = torch.full((1, 3, 1, 1), 0.5, dtype=dtype)
        self.linear = nn.Linear(config.gan.z_dim, 16 * width)
        self.blocks = nn.ModuleList(UpBlock(width, width, num_classes, upsample=True) for _ in range(3))
        self.bn = nn.BatchNorm2d(width)
        self.to_rgb = nn.Conv2d(width, 3, 1)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        h = self.linear(z).view(len(z), -1, 4, 4)
        for block in self.blocks:
            h = block(h, y)
        image = torch.tanh(self.to_rgb(F.relu(self.bn(h))))
        return image * self.half.to(image.device) + self.half.to(image.device)


class LatentAttacker(nn.Module):
    """A."""

    def __init__(self, num_classes: int, config: Config) -> None:
        super().__init__()
        self.clip = config.attacker.clip
        self.linear_in = nn.Linear(config.gan.z_dim, 256)
        self.blocks = nn.ModuleList([UpBlock(16, 32, num_classes, False), UpBlock(32, 16, num_classes, False)])
        self.linear_out = nn.Linear(256, config.gan.z_dim)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        h = self.linear_in(z).view(len(z), 16, 4, 4)
        for block in self.blocks:
            h = block(h, y)
        return z + self.clip * torch.tanh(self.linear_out(h.view(len(z), -1)))


# -- D ----------------------------------------------------------------------------------------------------------------


class PoolBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv1 = spectral_norm(nn.Conv2d(channels_in, channels_out, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = spectral_norm(nn.Conv2d(channels_in, channels_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(F.avg_pool2d(x, 2)) if self.first else F.avg_pool2d(self.shortcut(x), 2)
        r = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return shortcut + F.avg_pool2d(r, 2)


class ProjectionDiscriminator(nn.Module):
    """D; for all classes it looks each class up in turn, and each lookup makes a power iteration."""

    def __init__(self, num_classes: int, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.gan.width
        self.num_classes = num_classes
        self.normalise = Normalise((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), dtype)
        self.blocks = nn.Sequential(PoolBlock(3, width, True), *(PoolBlock(width, width, False) for _ in range(3)))
        self.linear = spectral_norm(nn.Linear(width, 1))
        self.embedding = spectral_norm(nn.Embedding(num_classes, width))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = F.relu(self.blocks(self.normalise(x))).sum(dim=(2, 3))
        score = self.linear(h)
        if y is not None:
            return score + (self.embedding(y) * h).sum(1, keepdim=True)
        all_scores = []
        for k in range(self.num_classes):
            of_class = (torch.ones(len(x), dtype=torch.long) * k).to(x.device)
            all_scores.append(score + (self.embedding(of_class) * h).sum(1, keepdim=True))
        return torch.cat(all_scores, 1)


# -- losses and the step ----------------------------------------------------------------------------------------------


def smooth_cross_entropy(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Label-smoothed cross-entropy by a one-hot target."""
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target.scatter_(1, y[:, None], 1 - smoothing + smoothing / logits.shape[1])
    return -(target * F.log_softmax(logits, 1)).sum(1).mean()


def project(x: Tensor, center: Tensor, eps: float) -> Tensor:
    """Into the L-inf ball, then into the image range."""
    return torch.clamp(torch.min(torch.max(x, center - eps), center + eps), 0.0, 1.0)


class Baseline:
    """Networks with the weights of `nets`, their optimisers, and the official step."""

    def __init__(self, config: Config, nets: Networks, noise: Noise, name: str = "eager") -> None:
        if name not in BASELINES:
            raise ValueError(f"name: {name!r} is not one of {', '.join(BASELINES)}")
        self.config, self.noise, self.empties_cache = config, noise, name == "verbatim"
        K, dtype, device = nets.C.num_classes, noise.dtype, noise.device
        self.C, self.C_ema = (WideResNet(K, config, noise) for _ in range(2))
        self.G, self.A = ResNetGenerator(K, config, dtype), LatentAttacker(K, config)
        self.D = ProjectionDiscriminator(K, config, dtype)
        for letter in ("C", "C_ema", "G", "A", "D"):
            net: nn.Module = getattr(self, letter).to(device, dtype)
            net.load_state_dict(_with_hooks(getattr(nets, letter).state_dict()) if letter == "D"
                                else getattr(nets, letter).state_dict())  # fmt: skip
            net.train()
        c, gan = config.optim, config.gan
        of_norms = [p for n, p in self.C.named_parameters() if "batchnorm" in n]
        others = [p for n, p in self.C.named_parameters() if "batchnorm" not in n]
        groups = [{"params": others}, {"params": of_norms, "weight_decay": 0.0}]
        self.opt_C = torch.optim.SGD(groups, lr=c.lr, weight_decay=c.weight_decay, momentum=0.9, nesterov=True)
        self.opt_G, self.opt_D, self.opt_A = (
            torch.optim.Adam(net.parameters(), lr=gan.lr, betas=gan.betas) for net in (self.G, self.D, self.A)
        )

    def step(self, batch: StepBatch, s: Scalars) -> dict[str, float]:
        """One step of stage 2; returns the logged losses."""
        logged: dict[str, Tensor] = {}
        for module in self.C.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = s.bn_momentum
        for group in self.opt_C.param_groups:
            group["lr"], group["momentum"] = s.lr, s.momentum
        for b in batch.D:
            logged["D/loss"] = self._discriminator(b)
            self.opt_D.step()
        y = batch.D[-1].y_l
        self.opt_G.zero_grad()
        logged["G/loss"] = -self.D(self.G(self._z(y), y), y).mean()
        logged["G/loss"].backward()
        self.opt_G.step()
        logged["A/loss"] = self._attacker(y)
        self.opt_A.step()
        values = {name: value.item() for name, value in logged.items()}
        for norm in (2.0, math.inf):  # for the log alone
            nn.utils.clip_grad_norm_(self.A.parameters(), math.inf, norm_type=norm)
        values |= self._classifier(batch.C, s)
        self.opt_C.step()
        with torch.no_grad():
            for p_ema, p in zip(self.C_ema.parameters(), self.C.parameters(), strict=True):
                p_ema *= s.ema_decay
                p_ema += p * (1 - s.ema_decay)
        return values

    def _discriminator(self, b: DiscBatch) -> Tensor:
        self.opt_D.zero_grad()
        self.C.eval()
        n_u = int(len(b.y_l) * self.config.data.mix_frac)
        n_l = len(b.y_l) - n_u
        with torch.no_grad():
            pseudo = self.C(b.x_ud).argmax(1)  # of all of x_ud, though a part is used
            x_real, y_real = torch.cat([b.x_l[:n_l], b.x_ud[:n_u]]), torch.cat([b.y_l[:n_l], pseudo[:n_u]])
        real = F.relu(1.0 - self.D(x_real, y_real)).mean()
        real.backward()
        with torch.no_grad():
            x_g, logits = self.G(self._z(b.y_l), b.y_l), self.C(b.x_u)
        fake_g = F.relu(1.0 + self.D(x_g, b.y_l)).mean()
        fake_c = (F.relu(1.0 + self.D(b.x_u)) * logits.softmax(1)).sum(1).mean()
        fake = 0.5 * fake_g + 0.5 * fake_c
        fake.backward()
        self.C.train()
        return (real + fake).detach()

    def _attacker(self, y: Tensor) -> Tensor:
        self.C.eval()
        self.opt_A.zero_grad()
        loss = -smooth_cross_entropy(self.C(self._uae(self._z(y), y)), y)
        loss.backward()  # into A, and into G and C too
        self.C.train()
        return loss.detach()

    def _classifier(self, b: SemiBatch, s: Scalars) -> dict[str, float]:
        weights, smoothing = self.config.loss, self.config.loss.label_smoothing
        self.opt_C.zero_grad()
        with torch.no_grad():
            x_uae = self._uae(self._z(b.y_l), b.y_l)
        logits_uae = self.C(x_uae)
        uae = s.adv_ramp * weights.uae_weight * smooth_cross_entropy(logits_uae, b.y_l, smoothing)
        uae.backward()
        accuracies = [_accuracy(logits_uae, b.y_l)]

        logits_l, logits_u = self.C(b.x_l), self.C(b.x_u)
        sup = smooth_cross_entropy(logits_l, b.y_l, smoothing)
        n_l = len(b.y_l) - int(len(b.y_l) * self.config.data.mix_frac)
        with torch.no_grad():
            d_u, y_u = self.D(b.x_u), self.C(b.x_u).argmax(1)
            x_m, y_m = torch.cat([b.x_l[:n_l], b.x_u[n_l:]]), torch.cat([b.y_l[:n_l], y_u[n_l:]])
            p_teacher = self.C_ema(x_m).softmax(1)
        fake = -s.adv_ramp * weights.gamma * (logits_u.softmax(1) * d_u).sum(1).mean()
        p = torch.cat([logits_l[:n_l], logits_u[n_l:]]).softmax(1)
        con = s.consistency_weight * ((p - p_teacher) ** 2).mean()
        (sup + con + fake).backward()

        logits_rae = self.C(self._pgd(x_m, y_m))
        rae = s.adv_ramp * weights.uae_weight * weights.rae_weight * smooth_cross_entropy(logits_rae, y_m, smoothing)
        accuracies += [_accuracy(logits_rae, b.y_l), _accuracy(logits_l, b.y_l)]
        rae.backward()
        values = {"C/sup": sup, "C/con": con, "C/fake": fake, "C/uae": uae, "C/rae": rae}
        logged = {name: value.item() for name, value in values.items()}
        self._empty_cache()
        return logged

    def _pgd(self, x: Tensor, y: Tensor) -> Tensor:
        a = self.config.attack
        x_adv = x.detach() + 0.001 * self.noise.normal("rae", x.shape)
        for _ in range(a.num_steps):
            x_adv.requires_grad_()
            (grad,) = torch.autograd.grad(smooth_cross_entropy(self.C(x_adv), y), [x_adv])
            x_adv = project(x_adv.detach() + a.step_size * torch.sign(grad.detach()), x, a.eps)
            self._empty_cache()
        return torch.clamp(x_adv, 0.0, 1.0)

    def _uae(self, z: Tensor, y: Tensor) -> Tensor:
        x_uae = self.G(self.A(z, y), y)
        with torch.no_grad():
            x_g = self.G(z, y)
        eps = self.config.uae.project_eps
        return x_uae if eps is None else project(x_uae, x_g, eps)

    def _z(self, y: Tensor) -> Tensor:
        return self.noise.normal("z", (len(y), self.config.gan.z_dim))

    def _empty_cache(self) -> None:
        if self.empties_cache and self.noise.device.type == "cuda":
            torch.cuda.empty_cache()


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(1) == y).float().mean().item()


def _with_hooks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names of D's weights as torch.nn.utils.spectral_norm has them."""

    def renamed() -> Iterator[tuple[str, Tensor]]:
        for name, value in state.items():
            layer, _, leaf = name.rpartition(".")
            yield f"{layer}.{ {'weight': 'weight_orig', 'u': 'weight_u', 'v': 'weight_v'}.get(leaf, leaf) }", value

    return dict(renamed())
