"""Every loss term of PUAT and its baselines, as pure functions of tensors. Equation numbers are the paper's.

Shapes: logits N x K, p = softmax(logits); labels y int64 N; D's scores d N x 1, d_all N x K (one per class). Every
function returns a scalar, the mean over the batch, unless it says otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from puat_fast import ops


def cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """CE_s: mean_b[(1 - s)(-log p_y) + s mean_k(-log p_k)] (spec 1.1)."""
    return ops.smooth_ce(logits, y, label_smoothing)


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Sum over the batch of -max(l_y - max_{k != y} l_k, 0): what a CW attack maximises (Carlini & Wagner 2017)."""
    return ops.cw_margin(logits, y)


# -- the discriminator's terms, eqs 7, 8, 11 in practice: a hinge ---------------------------------------------------


def hinge_real(d: Tensor) -> Tensor:
    """mean relu(1 - D(x_r, y_r))."""
    return ops.hinge(d, "real")


def hinge_fake(d: Tensor) -> Tensor:
    """mean relu(1 + D(G(z, y), y))."""
    return ops.hinge(d, "fake")


def hinge_fake_by_class(d_all: Tensor, logits: Tensor) -> Tensor:
    """mean_b sum_k p_k relu(1 + D(x_u, k)): the soft pseudo-label hinge; the weight stands outside the relu (eq 10)."""
    return ops.hinge_by_class(d_all, logits, "fake")


def generator_loss(d: Tensor) -> Tensor:
    """-mean D(G(z, y), y) (eq 8)."""
    return ops.hinge(d, "linear")


# -- the classifier's terms, eqs 12-17 ------------------------------------------------------------------------------


def consistency(logits: Tensor, logits_teacher: Tensor, reduce: str = "mean") -> Tensor:
    """Mean over the batch, mean (`sum`: sum, eq 13) over the classes, of (p_C - p_C')^2; no gradient to the teacher."""
    return ops.softmax_mse(logits, logits_teacher, reduce)


def classifier_vs_discriminator(logits: Tensor, d_all: Tensor) -> Tensor:
    """-mean_b sum_k p_k D(x_u, k): C's part of the three-player game (eqs 9, 15)."""
    return ops.hinge_by_class(d_all, logits, "linear")


def trades(logits: Tensor, logits_adv: Tensor, y: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """CE_s(C(x), y) + beta mean_b KL(p_C(x) || p_C(x_adv)); gradients flow through both (Zhang et al. 2019)."""
    return cross_entropy(logits, y, label_smoothing) + beta * kl_divergence(logits, logits_adv)


def kl_divergence(logits: Tensor, logits_adv: Tensor) -> Tensor:
    """mean_b KL(softmax(logits) || softmax(logits_adv))."""
    return F.kl_div(logits_adv.log_softmax(1), logits.softmax(1), reduction="batchmean")


# -- the AC-GAN behind GPGD and USong (spec 3) ------------------------------------------------------------------------


def acgan(validity: Tensor, label_log_probs: Tensor, target: float, y: Tensor) -> Tensor:
    """BCE(validity, target) + NLL(label_log_probs, y): of D on real or generated images, and of G.

    validity: N, in [0,1]; label_log_probs: N x (K + 1), class K is "fake"; target: 0 to 1; y: N class indices.
    """
    # F.binary_cross_entropy, logarithms from -100 up as there, but for nan: that raises there, on a GPU for good.
    yes, no = validity.log().clamp_min(-100), (1 - validity).log().clamp_min(-100)
    return -(target * yes + (1 - target) * no).mean() + F.nll_loss(label_log_probs, y)


# -- USong, the unrestricted attack of Song et al. 2018 as PUAT's code varies it -------------------------------------


def usong(
    logits: Tensor,
    label_log_probs: Tensor,
    delta: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm_weight: float,
    label_weight: float,
) -> Tensor:
    """CE(logits, y) - norm_weight mean relu(|delta| - eps) - label_weight NLL(label_log_probs, y), to be maximised.

    Means over the batch (CE, NLL) and over all elements (delta). logits: N x K; label_log_probs: N x (K + 1);
    delta: N x z_dim; y: N class indices.
    """
    excess = F.relu(delta.abs() - eps).mean()
    label = F.nll_loss(label_log_probs, y)
    return cross_entropy(logits, y) - norm_weight * excess - label_weight * label


# -- shared ---------------------------------------------------------------------------------------------------------


def project_linf(x: Tensor, center: Tensor, eps: float) -> Tensor:
    """P_e(x; center) = clip(min(max(x, center - eps), center + eps), 0, 1), elementwise (spec 1.1).

    x, center: images of one shape. The gradient is zero where clipped, half at an exact tie of min or max.
    """
    return torch.min(torch.max(x, center - eps), center + eps).clamp(0, 1)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Fraction of argmax logits equal to y, as a float scalar on the device."""
    return (logits.argmax(1) == y).to(logits.dtype).mean()
