"""Every loader on a GPU gives what the resident one gives on the CPU, also while the device is busy."""

from __future__ import annotations

import pytest
import torch
from loader_cases import IMAGES, KINDS, LABELS, augmentation, loader, sampler, tensors

from puat_fast.data import make_loader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no usable GPU"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", [None, "image", "batch"])
def test_same_as_on_the_cpu(kind, scope):
    if kind == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    augment = augmentation(scope)
    made = make_loader(kind, IMAGES, LABELS, sampler(), "cuda", torch.float32, augment)
    busy = torch.randn(4096, 4096, device="cuda")
    steps = []
    try:
        for n_disc in [0, 0, 2, 2, 2, 2, 1, 0]:
            for _ in range(5):
                busy = (busy @ busy).tanh()  # the host runs ahead: a buffer that is given out again too early shows
            steps.append((n_disc, made.next_step(n_disc)))
    finally:
        made.close()
    with loader("resident", augment=augment) as straight:
        for n_disc, step in steps:
            expected = tensors(straight.next_step(n_disc))
            for name, value in tensors(step).items():
                assert value.is_cuda and torch.equal(value.cpu(), expected[name]), name
