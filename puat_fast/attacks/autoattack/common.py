"""What the attacks of AutoAttack share: settings, checks of the input and of the model, norms, random numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from puat_fast.attacks.precision import check_precision, searching
from puat_fast.config import SearchPrecision
from puat_fast.networks.layers import Compiled, eval_mode, frozen_weights, uncompiled
from puat_fast.ops.pgd_step import Norm

Progress = Callable[[str, int, int, float], None]
"""progress(attack, runs finished, runs in all, robust accuracy so far), every few steps."""


SUSPICIOUS_LATE = 0.005
"""Part of the images, fooled in the last quarter of an attack's steps, beyond which one is warned."""


class AttackWarning(UserWarning):
    """The numbers of an attack may not mean what one takes them for."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of the attacks, checked: ValueError names the one that is wrong. Defaults: the standard version."""

    eps: float = 8 / 255
    norm: Norm = "linf"
    num_steps: int = 100
    num_queries: int = 5000
    num_targets: int = 9
    restarts: int = 1
    rho: float = 0.75
    p_init: float = 0.8
    batch_size: int = 250
    seed: int = 0
    faithful: bool = False
    precision: SearchPrecision = "fp32"

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm: {self.norm!r} is not one of linf, l2")
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise ValueError(f"eps: {self.eps}, accepted: finite numbers >= 0")
        for name in ("num_steps", "num_queries", "num_targets", "restarts", "batch_size"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"{name}: {value!r}, accepted: integers >= 1")
        for name in ("rho", "p_init"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)}, accepted: 0 < {name} <= 1")
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed: {self.seed!r}, accepted: integers from 0 to 2**63 - 1")
        if self.faithful and self.precision != "fp32":
            raise ValueError(f"precision: {self.precision!r}, but faithful is what the reference does, in fp32")


def check_images(x: Tensor, y: Tensor) -> None:
    """Raises ValueError, naming the argument, unless x is N x C x H x W in [0,1] and y holds N labels >= 0."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64):
        found = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: {found}, expected a tensor of images in [0,1], float32 or float64")
    if x.ndim != 4:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected N x C x H x W")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        found = f"dtype {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y: {found}, expected a tensor of class indices, int64")
    if tuple(y.shape) != (len(x),):
        raise ValueError(f"y: shape {tuple(y.shape)}, expected ({len(x)},), one class index for each image")
    if x.numel() and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"x: values from {x.min():g} to {x.max():g}, expected images in [0,1]")
    if y.numel() and y.min() < 0:
        raise ValueError(f"y: label {y.min()}, accepted: 0 to K - 1")


class Victim:
    """The attacked model: images -> checked logits, in batches of few sizes where it is compiled or on a GPU.

    Padding rows are copies of the first image; their logits are cut off, and so they send no gradient.
    """

    def __init__(self, model: nn.Module, device: torch.device, batch_size: int, pad: bool) -> None:
        self.model, self.device, self.batch_size = model, device, batch_size
        self.sizes = sorted({max(1, batch_size // n) for n in (1, 2, 4, 8)}) if pad else []
        self.compiled = [(m, m.compiled) for m in model.modules() if isinstance(m, Compiled)]
        self.num_classes = 0
        self.forwards = 0
        """Images that the model has seen, padding included."""
        self.warnings: list[str] = []
        self._broken: Tensor | None = None
        self.late = 0
        """Examples that were fooled only in the last quarter of an attack's steps."""
        self.starts, self._without_gradient = 0, torch.zeros((), dtype=torch.int64, device=device)

    @contextmanager
    def searched(self, precision: SearchPrecision) -> Iterator[None]:
        """Inside, the model works in `precision`; compiled, if it is, also where it is judged as it is written."""
        before = [module.compiled for module, _ in self.compiled]
        with searching(self.model, precision, self.device):
            try:
                for module, compiled in self.compiled:
                    module.compiled = compiled
                yield
            finally:
                for (module, _), compiled in zip(self.compiled, before, strict=True):
                    module.compiled = compiled

    def look(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits of the clean images, and first checks: labels within the model's classes, outputs that are logits."""
        logits = self.all_logits(x)
        self.num_classes = logits.shape[1]
        if int(y.max()) >= self.num_classes:
            raise ValueError(f"y: label {int(y.max())}, accepted: 0 to {self.num_classes - 1}, the model's classes")
        low, high, sums = logits.min(), logits.max(), logits.sum(1)
        if low > -1e-5 and high < 1 + 1e-5 and bool(((sums - 1).abs() < 1e-5).all()):
            self.warn("the outputs look like probabilities, 0 to 1 with sum 1: attack the logits, before the softmax")
        part = x[: self.batch_size]
        first, second = (
            (z / (z.norm(dim=1, keepdim=True) + 1e-10)) for z in (logits[: len(part)], self.all_logits(part))
        )
        if float((first - second).norm(dim=1).max()) > 1e-4:
            self.warn("two passes over the same images differ: a randomised model looks more robust here than it is")
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits N x K, float32 at least. Raises ValueError if the model returns anything else than N x K, K >= 2."""
        rows = len(x)
        size = next((s for s in self.sizes if s >= rows), rows)
        if size > rows:
            x = torch.cat([x, x[:1].detach().expand(size - rows, *x.shape[1:])])
        self.forwards += size
        logits = self.model(x)
        if not isinstance(logits, Tensor):
            raise ValueError(f"model: returned {type(logits).__name__}, expected a tensor of logits N x K")
        if logits.ndim != 2 or len(logits) != size or logits.shape[1] < 2 or not logits.is_floating_point():
            found = f"{logits.dtype} of shape {tuple(logits.shape)} for {size} images"
            raise ValueError(f"model: returned {found}, expected floating-point logits N x K, K >= 2")
        logits = logits[:rows] if size > rows else logits
        # no host sync: `check` reads it every few steps
        broken = ~logits.detach().isfinite().all()
        self._broken = broken if self._broken is None else self._broken | broken
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def check(self) -> None:
        """Raises ValueError if any logit so far was NaN or infinite."""
        if self._broken is not None and bool(self._broken):
            raise ValueError("model: logits are NaN or infinite, expected finite numbers")

    def note_gradients(self, grad: Tensor) -> None:
        """Count these starting points, and those of them whose gradient is zero."""
        self.starts += len(grad)
        self._without_gradient += (grad.flatten(1).abs().amax(1) == 0).sum()

    def warn(self, text: str) -> None:
        """Warn by an AttackWarning, and keep its text in `warnings`."""
        self.warnings.append(text)
        warnings.warn(text, AttackWarning, stacklevel=5)

    def warn_of_gradients(self, attack: str, images: int) -> None:
        """Warn if gradients were zero at starting points, or steps not through with converging; count anew.

        images: of which the late ones are a part.
        """
        found, starts, late = int(self._without_gradient), self.starts, self.late
        self.restore_counts([0, 0, 0])
        if found:
            self.warn(
                f"{attack}: zero gradient at {found} of {starts} starting points ({found / starts:.1%}): attacks that "
                "follow gradients say little about this model"
            )
        if late > max(1, SUSPICIOUS_LATE * images):
            self.warn(
                f"{attack}: {late} of {images} images ({late / images:.1%}) were fooled only in the last quarter of "
                "its steps: they have not converged, and more of them would likely find more"
            )

    def counts(self) -> list[int]:
        """What `warn_of_gradients` will tell, to be saved."""
        return [self.starts, int(self._without_gradient), self.late]

    def restore_counts(self, counts: list[int]) -> None:
        """Go on counting from there."""
        self.starts, without, self.late = counts
        self._without_gradient = torch.full_like(self._without_gradient, without)

    def num_targets(self, settings: Settings) -> int:
        """Target classes of each image: all but its own, if the settings ask for no less."""
        return min(settings.num_targets, self.num_classes - 1)

    @torch.no_grad()
    def all_logits(self, x: Tensor) -> Tensor:
        """Logits of any number of images, batch by batch, checked."""
        logits = torch.cat([self.logits(part) for part in x.split(self.batch_size)])
        self.check()
        return logits

    def loss_and_grad(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(logits, loss per image N, gradient of its sum with respect to x), all detached."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.logits(x)
            value = loss(logits)
            if value.requires_grad:
                (grad,) = torch.autograd.grad(value.sum(), [x])
                grad = grad.clone() if grad.is_cuda else grad  # a replayed graph would write the next one over it
            else:  # nothing in the model is differentiable
                grad = torch.zeros_like(x)
        return logits.detach(), value.detach(), grad


@contextmanager
def attacking(model: nn.Module, x: Tensor, settings: Settings) -> Iterator[Victim]:
    """The model as a Victim: in eval mode, without gradients of weights, random numbers forked; all restored after."""
    weight = next(model.parameters(), None)
    device = x.device if weight is None else weight.device
    check_precision(settings.precision, device)
    compiled = hasattr(model, "_orig_mod") or any(
        isinstance(m, Compiled) and m.compiled is not None for m in model.modules()
    )
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(eval_mode(model))
        stack.enter_context(frozen_weights(model))
        stack.enter_context(searching(model, "fp32", device))
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        seed_global(settings.seed, device)
        pad = (compiled or device.type == "cuda") and not settings.faithful
        victim = Victim(model, device, settings.batch_size, pad)
        if settings.precision != "fp32":  # few passes, which are not worth compiling for
            stack.enter_context(uncompiled(model))
        yield victim


def seed_global(seed: int, device: torch.device) -> None:
    """Seed torch's global generators, of the CPU and of this device alone; call it where they are forked."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def private_generator(*key: int) -> torch.Generator:
    """A generator on the CPU that depends on all numbers of the key, and on their order."""
    mixed = 0
    for number in key:  # splitmix64
        mixed = (mixed ^ number) + 0x9E3779B97F4A7C15 & 2**64 - 1
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 2**64 - 1
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed >> 1)


def lane_noise(kind: str, shape: Sequence[int], keys: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """len(keys) x shape, each row drawn by its own key, so that it does not depend on the others.

    kind: "rand", uniform on [0, 1), or "randn", normal.
    """
    draw = {"rand": torch.rand, "randn": torch.randn}[kind]
    rows = [draw(tuple(shape), generator=private_generator(*key)) for key in keys]
    return torch.stack(rows).to(like) if rows else like.new_empty((0, *shape))


def column(values: Tensor, like: Tensor) -> Tensor:
    """N numbers as N x 1 x 1 x 1, to go with images."""
    return values.view(-1, *[1] * (like.ndim - 1))


def length(delta: Tensor, norm: Norm) -> Tensor:
    """|delta| of each image, N x C x H x W -> N: max |delta_i|, or sqrt(sum delta_i^2)."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else (flat**2).sum(-1).sqrt()


def normalized(delta: Tensor, norm: Norm) -> Tensor:
    """delta / (|delta| + 1e-12), image by image."""
    return delta / (column(length(delta, norm), delta) + 1e-12)
