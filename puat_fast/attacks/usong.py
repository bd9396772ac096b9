"""USong: unrestricted adversarial examples from an AC-GAN (Song et al. 2018), as PUAT's code varies it (spec 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from puat_fast import objectives
from puat_fast.attacks.gpgd import (
    Compat,
    LatentExamples,
    LatentSettings,
    Start,
    exactly,
    prepare_latents,
    search_latent,
)
from puat_fast.attacks.pgd import check_not_negative
from puat_fast.noise import Noise


@torch.inference_mode(False)
def usong(
    model: nn.Module,
    generator: nn.Module,
    discriminator: nn.Module,
    y: Tensor,
    *,
    eps: float = 0.01,
    step_size: float = 0.1,
    num_steps: int = 200,
    norm_weight: float = 100.0,
    label_weight: float = 100.0,
    z: Tensor | None = None,
    image_size: int = 32,
    antialias: bool = False,
    start: Start | None = None,
    compat: Compat = "none",
    seed: int = 0,
    noise: Noise | None = None,
) -> LatentExamples:
    """Untargeted USong: images that an AC-GAN's label head calls y and the model does not.

        delta <- delta + step_size sign(grad[CE(model(x), y) - norm_weight mean relu(|delta| - eps)
                                             - label_weight NLL(D_label(x), y)]),  x = Gen(z + delta, y)

    num_steps times; the weights are the paper's lambda1 and lambda2. The bound on delta is soft: |delta| exceeds eps,
    by far. start: `ball` or `image`, see `gpgd`; as delta is never projected, `image` searches from z clamped to [0,1]
    to the end.
    discriminator: generated images, at the generator's own size -> (anything, log-probabilities N x (K + 1)). Nothing
    ensures that the result still shows y: report the fraction where D's label head agrees on `generated_adv`, and the
    model's accuracy on x_nat. One call is one draw per label; the official script makes 10.

    compat `official-v1`: start `image` unless one is named; generator and discriminator stay in the mode they are in
    (as published: train, with batch statistics and dropout). All else as in `gpgd`: arguments, draws, modes, gradients,
    errors.

    Source: PUAT, Table IX; Song et al. 2018 (arXiv:1805.07894) minimise a targeted loss by noisy gradient descent.
    """
    settings = LatentSettings(eps, step_size, num_steps, image_size, antialias, start, compat)
    check_not_negative("norm_weight", norm_weight)
    check_not_negative("label_weight", label_weight)
    y, z, noise = prepare_latents(model, generator, y, z, seed, noise)

    classes = int(y.max()) + 1 if len(y) else 0

    def objective(generated: Tensor, logits: Tensor, delta: Tensor) -> Tensor:
        with exactly(y.device):
            label_log_probs = _label_head(discriminator(generated), len(y), classes)
        return objectives.usong(
            logits, label_log_probs, delta, y, eps=eps, norm_weight=norm_weight, label_weight=label_weight
        )

    return search_latent(model, generator, y, z, objective, settings, noise, radius=None, critics=(discriminator,))


def _label_head(output: object, rows: int, classes: int) -> Tensor:
    """The second of a discriminator's outputs. Raises ValueError unless it is rows x K, K >= classes."""
    head = output[1] if isinstance(output, tuple) and len(output) == 2 else None
    if not (isinstance(head, Tensor) and head.ndim == 2 and len(head) == rows and head.shape[1] >= classes):
        found = f"label head of shape {tuple(head.shape)}" if isinstance(head, Tensor) else type(output).__name__
        raise ValueError(f"discriminator: returned {found}, expected (anything, log-probabilities N x (K + 1))")
    return head
