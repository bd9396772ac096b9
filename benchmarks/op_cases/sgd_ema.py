"""sgd_ema_ reads param, grad, buffer and average and writes three of them: seven passes; adam_ has as many.

The reference is what it replaces: torch's foreach update, and for C the loop over the teacher's tensors. Both update
the same tensors in place, with rates so small that no number of rounds changes them: results are left to the tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from op_cases import F32, Case, Size
from puat_fast.networks import Classifier, Discriminator, Generator
from puat_fast.ops import adam_, sgd_ema_

LR, MOMENTUM, DECAY, BETAS, EPS = 1e-12, 0.9, 0.99, (0.0, 0.99), 1e-8
CLASSIFIERS = {"tiny": [(10, 1)], "cpu": [(10, 1), (10, 2), (28, 10)], "gpu": [(28, 10)]}
WIDTHS = {"tiny": [], "cpu": [16, 256], "gpu": [256]}  # of G and D: of digits' size, and the default


@torch.no_grad()
def sgd_reference(params, grads, buffers, emas, decays) -> None:
    sgd(
        params, grads, buffers, foreach=True, weight_decay=decays[0], momentum=MOMENTUM, lr=LR, dampening=0.0,
        nesterov=True, maximize=False,
    )  # fmt: skip
    for ema, p in zip(emas, params, strict=True):
        ema.mul_(DECAY).add_(p, alpha=1 - DECAY)


@torch.no_grad()
def adam_reference(params, grads, exp_avgs, exp_avg_sqs, steps) -> None:
    capturable = params[0].is_cuda or torch.compiler.is_compiling()  # as torch.compile makes it for an optimiser
    adam(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=True, capturable=capturable, amsgrad=False,
        beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=0.0, eps=EPS, maximize=False,
    )  # fmt: skip


def sgd_ours(params, grads, buffers, emas, decays) -> None:
    sgd_ema_(params, grads, buffers, emas, lr=LR, momentum=MOMENTUM, weight_decays=decays, ema_decay=DECAY)


def adam_ours(params, grads, exp_avgs, exp_avg_sqs, steps) -> None:
    adam_(params, grads, exp_avgs, exp_avg_sqs, steps, lr=LR, betas=BETAS, eps=EPS)


def tensors_of(net: nn.Module, device: torch.device) -> list[Tensor]:
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return [p.detach() for p in net.parameters()]


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    for depth, width in CLASSIFIERS[size]:
        params = tensors_of(Classifier(10, depth, width, (0.5,) * 3, (0.5,) * 3), device)
        count = sum(p.numel() for p in params)
        grads, buffers, emas = ([torch.randn_like(p) for p in params] for _ in range(3))
        inputs = (params, grads, buffers, emas, [5e-4] * len(params))
        what = f"SGD + EMA, WRN-{depth}-{width}"
        yield Case("sgd_ema", what, (count,), F32, "NHWC", 7 * 4 * count, sgd_reference, sgd_ours, inputs)
    for width in WIDTHS[size]:
        for name, net in (("G", Generator(10, 256, width)), ("D", Discriminator(10, width, False))):
            params = tensors_of(net, device)
            count = sum(p.numel() for p in params)
            grads, exp_avgs = ([torch.randn_like(p) for p in params] for _ in range(2))
            exp_avg_sqs = [torch.rand_like(p) for p in params]
            steps = [torch.ones((), device=device) for _ in params]
            inputs = (params, grads, exp_avgs, exp_avg_sqs, steps)
            what = f"Adam, {name} of width {width}"
            yield Case("sgd_ema", what, (count,), F32, "NHWC", 7 * 4 * count, adam_reference, adam_ours, inputs)
