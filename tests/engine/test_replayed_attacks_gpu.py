"""Attacks on a GPU: a compiled classifier, and one whose graphs are replayed, are attacked as the eager one."""

from __future__ import annotations

import copy

import pytest
import torch
from op_checks import NO_CUDA

from puat_fast.attacks import autoattack, pgd
from puat_fast.engine import compiling
from puat_fast.networks.classifier import Classifier

pytestmark = [pytest.mark.gpu, NO_CUDA]


@pytest.mark.parametrize("graphs", [False, True])
def test_attacked_as_the_eager_one(graphs: bool) -> None:
    torch.manual_seed(0)
    C = Classifier(10, 10, 1).cuda().eval()
    x = torch.rand(40, 3, 32, 32, device="cuda")
    with torch.no_grad():
        y = C(x).argmax(1)
    net = copy.deepcopy(C)
    net.set_fold_bn(True)
    compiling.compile_network(net, graphs)
    short = {"iterations": 10, "num_queries": 40, "num_targets": 3, "batch_size": 16}
    for precision in ("fp32", "bf16"):
        eager, fast = (autoattack(model, x, y, 1 / 255, precision=precision, **short) for model in (C, net))
        assert 0 < eager.robust_acc < 1 and abs(eager.robust_acc - fast.robust_acc) <= 2 / 40
        with torch.no_grad():
            assert torch.equal((C(fast.x_adv).argmax(1) == y).cpu(), fast.robust)
    losses = [
        torch.nn.functional.cross_entropy(C(pgd(model, x, y, eps=1 / 255, step_size=0.25 / 255, num_steps=10)), y)
        for model in (C, net)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)
