"""The picture of a run: real images, G(z,y) and UAEs in rows, with what C' says of each."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from puat_fast import objectives
from puat_fast.config import Config
from puat_fast.networks import Networks
from puat_fast.networks.layers import eval_mode, uncompiled
from puat_fast.noise import Noise
from puat_fast.plots import ImageRow, verdicts

SEED = 20240823  # of the latents: the same z in every picture of a run, so that progress shows


@torch.no_grad()
def sample_rows(
    nets: Networks,
    config: Config,
    images: Tensor,
    labels: Tensor,
    *,
    per_class: int = 1,
    seed: int = SEED,
    with_uae: bool = True,
) -> list[ImageRow]:
    """Rows of per_class columns for each class: real, G(z,y), and, of the same z, the UAE P(G(A(z,y),y); G(z,y)).

    images: uint8 N x 3 x 32 x 32 to take the real ones from, labels: int64 N; with_uae: false in stage 1, in which A is
    not trained. All networks in eval mode; their state and the noise of training are left alone.
    """
    parameter = next(nets.C.parameters())
    device, dtype = parameter.device, parameter.dtype
    num_classes = nets.C.num_classes
    chosen = torch.cat([torch.nonzero(labels == k)[:per_class, 0] for k in range(num_classes)])
    real, y_real = images[chosen].to(device, dtype).div(255), labels[chosen]
    y = torch.arange(num_classes, device=device).repeat_interleave(per_class)
    z = Noise(seed, device, dtype).normal("z", (len(y), config.gan.z_dim))
    with ExitStack() as modes:
        for net in (nets.G, nets.A, nets.C_ema):
            modes.enter_context(eval_mode(net))
            modes.enter_context(uncompiled(net))
        x_g = nets.G(z, y)
        x_uae = nets.G(nets.A(z, y), y)
        if config.uae.project_eps is not None:
            x_uae = objectives.project_linf(x_uae, x_g, config.uae.project_eps)
        kinds = [("real", real, y_real), ("G(z,y)", x_g, y), ("UAE", x_uae, y)]
        rows = []
        for label, x, truth in kinds if with_uae else kinds[:2]:
            captions, good = verdicts(truth.tolist(), nets.C_ema(x).argmax(1).tolist())
            rows.append(ImageRow(label=label, images=_numpy(x), captions=captions, good=good))
    return rows


def _numpy(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.float().cpu().numpy()
    return array
