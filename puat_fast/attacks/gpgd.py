"""GPGD: PGD in the latent space of a class-conditional generator, for unrestricted adversarial examples (spec 3).

Also the search that GPGD and USong share (`search_latent`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from puat_fast import objectives
from puat_fast.attacks.acgan import shrink
from puat_fast.attacks.autoattack.common import Victim
from puat_fast.attacks.pgd import check_not_negative, checked_logits
from puat_fast.networks.layers import eval_mode
from puat_fast.noise import Noise

Compat = Literal["none", "official-v1"]
Start = Literal["ball", "image"]

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(generated images, logits, delta) -> scalar to be maximised."""


@dataclass(frozen=True)
class LatentExamples:
    """What a latent attack found: all detached, N rows each, in the order of the labels.

    x_nat, x_adv: Gen(z, y) and Gen(z + delta, y) as the classifier saw them (after `shrink`). Report accuracy on
    both: generated images may be easier, or harder, than the test set. generated_nat, generated_adv: the same at the
    generator's own size, for an AC-GAN's D: does its label head still say y? z: N x z_dim; delta: of z's shape.
    """

    x_adv: Tensor
    x_nat: Tensor
    generated_adv: Tensor
    generated_nat: Tensor
    z: Tensor
    delta: Tensor

    @property
    def z_adv(self) -> Tensor:
        """z + delta."""
        return self.z + self.delta


@dataclass(frozen=True)
class LatentSettings:
    """Numbers of a latent attack, checked."""

    eps: float
    step_size: float
    num_steps: int
    image_size: int
    antialias: bool
    start: Start | None
    compat: Compat

    def __post_init__(self) -> None:
        for name in ("eps", "step_size", "num_steps"):
            check_not_negative(name, getattr(self, name))
        if self.image_size < 1:
            raise ValueError(f"image_size: {self.image_size}, accepted: >= 1")
        if self.compat not in ("none", "official-v1"):
            raise ValueError(f"compat: {self.compat!r} is not one of none, official-v1")
        if self.start not in ("ball", "image", None):
            raise ValueError(f"start: {self.start!r} is not one of ball, image, None")

    def first(self, z: Tensor, uniform: Tensor) -> Tensor:
        """Where delta starts, from U[0, 1) of z's shape: U(-eps, eps); image: clip(z + U(-eps, eps), 0, 1) - z."""
        delta = (2 * uniform.to(z) - 1) * self.eps
        start = self.start or ("image" if self.compat == "official-v1" else "ball")
        return (z + delta).clamp(0, 1) - z if start == "image" else delta


@torch.inference_mode(False)
def gpgd(
    model: nn.Module,
    generator: nn.Module,
    y: Tensor,
    *,
    eps: float = 0.1,
    step_size: float = 0.1,
    num_steps: int = 20,
    z: Tensor | None = None,
    image_size: int = 32,
    antialias: bool = False,
    start: Start | None = None,
    compat: Compat = "none",
    seed: int = 0,
    noise: Noise | None = None,
) -> LatentExamples:
    """L-inf PGD on the latent: images of class y, near Gen(z, y) in latent space, that the model gets wrong.

        delta <- clip(delta + step_size sign(grad CE(model(Gen(z + delta, y)), y)), -eps, eps), num_steps times

    model: images -> logits N x K. generator: (z, y) -> images N x 3 x H x W in [0,1]; those larger than image_size
    are resized to it for the model (`shrink`, antialias). y: N class indices, the classes to generate and to be
    recognised. z: N x z_dim; None draws N(0, I) of generator.z_dim. Latents take the model's device and dtype.

    start: where delta begins. `ball`: U(-eps, eps). `image`: clip(z + U(-eps, eps), 0, 1) - z, as if z were an image:
    a search from z clamped to [0,1], far outside the ball until the first projection. None: as compat has it, `image`
    with `official-v1`, else `ball`.

    compat `official-v1`: the generator stays in the mode it is in (the official script leaves it in train mode, where
    batch statistics couple the samples and its running statistics move). `none`: it runs in eval mode, as the model
    always does; modes come back afterwards. No parameter collects a gradient.

    Draws: normal `latent` (when z is None), then uniform `latent_start`, from `noise`, or from a new one of `seed`.
    Dropout of a network in train mode, too, follows from it; the global RNG is left as it was.

    Source: PUAT, Table IX (eps 0.1 and 0.01). Raises ValueError, naming the argument, for labels out of range, a
    negative eps, step_size or num_steps, a z of the wrong shape, and for outputs that are not images or finite logits.
    """
    settings = LatentSettings(eps, step_size, num_steps, image_size, antialias, start, compat)
    y, z, noise = prepare_latents(model, generator, y, z, seed, noise)

    def objective(generated: Tensor, logits: Tensor, delta: Tensor) -> Tensor:
        return objectives.cross_entropy(logits, y)

    return search_latent(model, generator, y, z, objective, settings, noise, radius=eps)


def prepare_latents(
    model: nn.Module, generator: nn.Module, y: Tensor, z: Tensor | None, seed: int, noise: Noise | None
) -> tuple[Tensor, Tensor, Noise]:
    """y and z, checked, on the model's device and in its dtype, and the noise; z is drawn where it is None."""
    _check_labels(y, getattr(generator, "num_classes", None))
    weights = chain(model.parameters(), generator.parameters())
    like = next((w for w in weights if w.is_floating_point()), torch.empty(0))
    noise = noise or Noise(seed, like.device, like.dtype)
    z_dim = getattr(generator, "z_dim", None)
    if z is None:
        if z_dim is None:
            raise ValueError(f"z: needed, since {type(generator).__name__} does not tell its z_dim")
        z = noise.normal("latent", (len(y), z_dim))
    expected = tuple(z.shape[1:]) if z_dim is None else (z_dim,)
    if tuple(z.shape) != (len(y), *expected):
        raise ValueError(f"z: shape {tuple(z.shape)}, expected {(len(y), *expected)}")
    # copies: tensors made in inference mode do not go into a backward pass
    return y.to(like.device, torch.int64, copy=True), z.detach().to(like, copy=True), noise


def search_latent(
    model: nn.Module,
    generator: nn.Module,
    y: Tensor,
    z: Tensor,
    objective: Objective,
    settings: LatentSettings,
    noise: Noise,
    *,
    radius: float | None,
    critics: Sequence[nn.Module] = (),
) -> LatentExamples:
    """num_steps of delta <- delta + step_size sign(grad objective), each time back to |delta| <= radius, if given.

    critics: further networks that the objective runs; like the generator, they are in eval mode unless official-v1.
    Forwards of the generator: z, then z + delta once per step, then the result, as in the official code.
    """
    s = settings
    delta = s.first(z, noise.uniform("latent_start", z.shape))
    victim = Victim(model, z.device, max(len(y), 1), pad=False)
    classify = checked_logits(victim, int(y.max()) if len(y) else -1)

    def generate(latent: Tensor) -> Tensor:
        with exactly(z.device):
            images = generator(latent, y)
        if not (isinstance(images, Tensor) and images.ndim == 4 and len(images) == len(y)):
            found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"generator: returned {found}, expected {len(y)} images N x 3 x H x W")
        return images

    with ExitStack() as stack:
        for network in (model,) if s.compat == "official-v1" else (model, generator, *critics):
            stack.enter_context(eval_mode(network))
        stack.enter_context(_private_rng(noise, z.device))
        with torch.no_grad():
            generated_nat = generate(z)
        for _ in range(s.num_steps):
            delta.requires_grad_()
            with torch.enable_grad():
                generated = generate(z + delta)
                value = objective(generated, classify(shrink(generated, s.image_size, s.antialias)), delta)
            (grad,) = torch.autograd.grad(value, [delta])
            delta = delta.detach() + s.step_size * grad.sign()
            if radius is not None:
                delta = delta.clamp(-radius, radius)
        with torch.no_grad():
            generated_adv = generate(z + delta)
        victim.check()
    x_adv, x_nat = (shrink(images, s.image_size, s.antialias) for images in (generated_adv, generated_nat))
    return LatentExamples(x_adv, x_nat, generated_adv, generated_nat, z, delta)


def exactly(device: torch.device) -> torch.autocast:
    """Inside, networks work as they are: only the attacked model is searched in a lower precision."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _private_rng(noise: Noise, device: torch.device) -> Iterator[None]:
    """Inside, torch's global generators (dropout's) run from a seed that `noise` gives; afterwards they are back."""
    seed = int(torch.randint(2**62, (), generator=noise.generator, device=noise.device))
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(seed)
        yield


def _check_labels(y: Tensor, num_classes: int | None) -> None:
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        found = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: {found}, expected a tensor of N class indices")
    if len(y) and not (y.min() >= 0 and (num_classes is None or y.max() < num_classes)):
        accepted = ">= 0" if num_classes is None else f"0 to {num_classes - 1}"
        raise ValueError(f"y: labels from {y.min()} to {y.max()}, accepted: {accepted}")
