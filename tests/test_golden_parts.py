"""Golden files 01, 02, 03, 07, 12, 13a, 15: schedules, losses, networks, attacks, teacher, TRADES."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import arrays_of, close, tiny_config, tiny_networks

from puat_fast import objectives as L
from puat_fast.attacks.pgd import ascend, attack_loss, gauss_start, pgd
from puat_fast.engine import ema, optim, schedules
from puat_fast.methods.trades import VERSIONS, trades_loss
from puat_fast.networks import Classifier, Networks
from puat_fast.networks.layers import SpectralNorm
from puat_fast.testing import RecordedNoise, as_images

EPS = 8 / 255


def nets_of(dtype: torch.dtype, **draws: list[np.ndarray]) -> Networks:
    return tiny_networks(tiny_config(), RecordedNoise(draws, dtype=dtype))


# -- 01 schedules ---------------------------------------------------------------------------------------------------


def test_ramps(golden):
    g, E = golden["01_schedules"], int(golden["01_schedules"]["adv_ramp_steps_per_epoch"])
    close([schedules.sigmoid_ramp(t, 1, 1 + 10 * E) for t in g["adv_ramp_steps"]], g["adv_ramp"], torch.float64)
    close([schedules.sigmoid_ramp(t, 1, 1 + 30 * E) for t in g["con_ramp_steps"]], g["con_ramp_30ep"], torch.float64)
    close([schedules.sigmoid_ramp(t, 1, 1) for t in g["con_ramp_steps"]], g["con_ramp_0ep"], torch.float64)
    close([schedules.sigmoid_ramp(t, 1 + 150 * E, 1 + 160 * E) for t in (1, 100 * E)], g["pre_adv_ramp"], torch.float64)


@pytest.mark.parametrize("tau", [0.99, 0.995, 0.999])
def test_ema_decay(golden, tau):
    g = golden["01_schedules"]
    decays = [schedules.ema_decay(int(t), float(g["ema_warmup"]), tau) for t in g["ema_steps"]]
    close(decays, g[f"ema_decay_rate{tau}"], torch.float64)


@pytest.mark.parametrize(("epochs", "pct", "key"), [(100, 0.025, "0025"), (100, 0.05, "005"), (400, 0.025, "0025")])
def test_one_cycle(golden, epochs, pct, key):
    g = golden["01_schedules"]
    lrs = [schedules.learning_rate(e, epochs, 0.2, pct) for e in range(1, epochs + 1)]
    momenta = [schedules.momentum(e, epochs, pct) for e in range(1, epochs + 1)]
    close(lrs, g[f"lr_T{epochs}_pct{key}"], torch.float64)
    close(momenta, g[f"mom_T{epochs}_pct{key}"], torch.float64)


def test_rst_cosine(golden):
    lrs = [schedules.cosine_learning_rate(e, 200, 0.1) for e in range(1, 201)]
    close(lrs, golden["01_schedules"]["cosine_rst_lr"], torch.float64)


# -- 02 losses ------------------------------------------------------------------------------------------------------


def leaf(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(array).to(dtype).requires_grad_()


@pytest.mark.parametrize("s", [0.0, 0.1])
def test_cross_entropy(golden, dtype, s):
    g = golden["02_losses"]
    logits = leaf(g["logits"], dtype)
    loss = L.cross_entropy(logits, torch.from_numpy(g["labels"]), s)
    loss.backward()
    close(loss, g[f"ce_s{s}_loss"], dtype)
    close(logits.grad, g[f"ce_s{s}_grad"], dtype)


def test_cw_margin(golden, dtype):
    g = golden["02_losses"]
    logits = leaf(g["logits"], dtype)
    loss = L.cw_margin(logits, torch.from_numpy(g["cw_labels"]))
    loss.backward()
    close(loss, g["cw_loss"], dtype)
    close(logits.grad, g["cw_grad"], dtype)


def test_consistency(golden, dtype):
    g = golden["02_losses"]
    logits, teacher = leaf(g["logits"], dtype), leaf(g["cons_teacher_logits"], dtype)
    loss = 50 * L.consistency(logits, teacher)
    loss.backward()
    close(loss, g["cons50_loss"], dtype)
    close(logits.grad, g["cons50_grad"], dtype)
    assert teacher.grad is None
    summed = L.consistency(logits.detach(), teacher, "sum")
    close(summed, logits.shape[1] * L.consistency(logits.detach(), teacher), dtype)


def test_hinge(golden, dtype):
    g = golden["02_losses"]
    d_real, d_g, d_c = (leaf(g[name], dtype) for name in ("d_real", "d_fake_g", "d_fake_c"))
    real = L.hinge_real(d_real)
    logits = torch.from_numpy(g["hinge_c_logits"]).to(dtype)
    total = real + 0.5 * L.hinge_fake(d_g) + 0.5 * L.hinge_fake_by_class(d_c, logits)
    total.backward()
    close(real, g["hinge_real"], dtype)
    close(total, g["hinge_total"], dtype)
    close(d_real.grad, g["hinge_gd_real"], dtype)
    close(d_g.grad, g["hinge_gd_fake_g"], dtype)
    close(d_c.grad, g["hinge_gd_fake_c"], dtype)


def test_classifier_vs_discriminator(golden, dtype):
    g = golden["02_losses"]
    logits = leaf(g["logits"], dtype)
    loss = L.classifier_vs_discriminator(logits, torch.from_numpy(g["d_fake_c"]).to(dtype))
    loss.backward()
    close(loss, g["c_adv_loss"], dtype)
    close(logits.grad, g["c_adv_grad"], dtype)


def test_projection(golden):
    g, dtype = golden["02_losses"], torch.float64  # the tie in the last element is exact in float64 only
    x = leaf(g["proj_in"], dtype)
    out = L.project_linf(x, torch.from_numpy(g["proj_center"]).to(dtype), EPS)
    out.sum().backward()
    close(out, g["proj_out"], dtype)
    close(x.grad, g["proj_grad"], dtype)


# -- 03 networks ----------------------------------------------------------------------------------------------------


def assert_state(module: torch.nn.Module, expected: dict[str, torch.Tensor], dtype: torch.dtype, **tol: float) -> None:
    assert expected
    state = module.state_dict()
    for name, array in expected.items():
        close(state[name], array, dtype, **tol)


def test_networks(golden, dtype):
    g, nets = golden["03_modules"], nets_of(dtype)
    x, y, z = as_images(g["x"], dtype), torch.from_numpy(g["y"]), torch.from_numpy(g["z"]).to(dtype)
    for name in ("C", "G", "A"):
        getattr(nets, name).eval()
    close(nets.C(x), g["C_eval"], dtype)
    close(nets.G(z, y), g["G_eval"], dtype)
    close(nets.A(z, y), g["A_eval"], dtype)
    for name, inputs in (("C", (x,)), ("A", (z, y)), ("G", (z, y))):
        net = getattr(nets, name).train()
        close(net(*inputs), g[f"{name}_train"], dtype, atol32=1e-5)
        assert_state(net, arrays_of(name, g, f"{name}_after_train."), dtype, atol32=1e-5)


def test_discriminator(golden, dtype):
    g, D = golden["03_modules"], nets_of(dtype).D
    x, y = as_images(g["x"], dtype), torch.from_numpy(g["y"])
    D.eval()
    close(D(x, y), g["D_eval_y"], dtype, atol32=1e-5)
    close(D(x), g["D_eval_all"], dtype, atol32=1e-5)
    D.train()
    close(D(x, y), g["D_train_y_call1"], dtype, atol32=1e-5)
    close(D(x), g["D_train_all_call2"], dtype, atol32=1e-5)
    close(D(x, y), g["D_train_y_call3"], dtype, atol32=1e-5)
    assert_state(D, arrays_of("D", g, "D_after3."), dtype, atol32=1e-5)


def test_one_lookup_is_the_same_in_eval_mode(golden, dtype):
    """gan.sn_per_class_lookup changes only the number of power iterations."""
    D, x = nets_of(dtype).D.eval(), as_images(golden["03_modules"]["x"], dtype)
    per_class = D(x)
    D.per_class_lookup = False
    close(D(x), per_class.detach(), dtype, atol32=1e-5)


SN_LAYERS = [("l7", "linear"), ("block1.c1", "blocks.0.conv1"), ("l_y", "embedding")]


@pytest.mark.parametrize(("official", "ours"), SN_LAYERS)
def test_spectral_norm_iterations(golden, dtype, official, ours):
    g, layer = golden["03_modules"], nets_of(dtype).D.get_submodule(ours)
    assert isinstance(layer, SpectralNorm)
    layer.train()
    for k in range(1, 6):
        weight = layer.normalised_weight()
        close((layer.weight / weight).flatten()[0], g[f"SN.{official}.sigma_k{k}"], dtype)
        if f"SN.{official}.weight_k{k}" in g:
            close(weight, g[f"SN.{official}.weight_k{k}"], dtype)


# -- 07, 13a attacks ------------------------------------------------------------------------------------------------


def assert_attack(x_adv: torch.Tensor, x: torch.Tensor, delta255: np.ndarray, dtype: torch.dtype) -> None:
    """float64: equal up to storage; float32: at most one pixel in a thousand differs (sign flips)."""
    delta, expected = 255 * (x_adv - x).double(), torch.from_numpy(delta255).double()
    if dtype == torch.float64:
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)
    else:
        assert ((delta - expected).abs() > 1e-3).double().mean() <= 1e-3


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_training_pgd(golden, dtype, mode, steps):
    g = golden["07_pgd_train"]
    C = nets_of(dtype).C.train(mode == "train")
    x, y = as_images(g["x"], dtype), torch.from_numpy(g["y"])
    start = gauss_start(x, RecordedNoise({"rae": [g["noise"]]}, dtype=dtype))
    x_adv = ascend(C, x, start, attack_loss("ce", y), eps=EPS, step_size=2 / 255, num_steps=steps)
    assert_attack(x_adv, x, g[f"delta255_{mode}_step{steps}"], dtype)
    if (mode, steps) == ("train", 10):
        assert_state(C, arrays_of("C", g, "C_after10."), dtype, atol32=1e-4)
        close(C(x_adv), g["logits_after10_train"], dtype, rtol32=1e-3, atol32=1e-4)


@pytest.mark.parametrize(
    ("key", "loss", "step_size", "steps"),
    [*(("cw", "cw", 2 / 255, n) for n in (1, 2, 5, 40)), *(("pgd20", "ce", 1 / 255, n) for n in (1, 20))],
)
def test_evaluation_pgd(golden, dtype, key, loss, step_size, steps):
    """The public function to the last digit: deltas are stored as float32, logits as float64."""
    g = golden["13a_eval_pgd"]
    C = nets_of(dtype).C.train()  # pgd itself puts it in eval mode
    x, y = as_images(g["x"], dtype), torch.from_numpy(g["y"])
    start = (x + torch.from_numpy(g["u"]).to(dtype) * EPS).clamp(0, 1)
    x_adv = pgd(C, x, y, eps=EPS, step_size=step_size, num_steps=steps, loss=loss, start=start)
    exact = dtype == torch.float64
    delta, expected = 255 * (x_adv - x).double(), torch.from_numpy(g[f"{key}_delta255_step{steps}"]).double()
    torch.testing.assert_close(delta, expected, rtol=0, atol=5e-7 if exact else 2e-5)
    logits = C.eval()(x_adv).double()
    expected = torch.from_numpy(g[f"{key}_logits_step{steps}"])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12 if exact else 1e-6)
    replayed = RecordedNoise({"rae": [(g["u"].astype(np.float64) + 1) / 2]}, dtype=dtype)
    drawn = pgd(C, x, y, eps=EPS, step_size=step_size, num_steps=steps, loss=loss, noise=replayed)
    torch.testing.assert_close(drawn, x_adv, rtol=0, atol=1e-12 if exact else 1e-6)


# -- 12 teacher -----------------------------------------------------------------------------------------------------


def test_ema_and_shared_buffers(golden, dtype):
    g, nets = golden["12_ema_bn"], nets_of(dtype)
    C, C_ema = nets.C, nets.C_ema
    x = as_images(g["x_l"], dtype)
    optimizer = optim.sgd(C, C_ema, tiny_config().optim)
    for s in range(1, 5):
        with torch.no_grad():
            for i, p in enumerate(C.parameters()):
                p += 0.01 * np.sin(s + i)
                p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"], group["ema_decay"] = 0.0, schedules.ema_decay(s, 2, 0.995)
        optimizer.step()
        close(C_ema.logits.weight, g[f"teacher_logits_w_s{s}"], dtype, atol32=1e-5)
    assert ema.bn_is_shared(C_ema, C) == bool(g["alias_before"])
    before = C.batchnorm.running_mean.clone()
    ema.share_bn(C_ema, C)
    assert ema.bn_is_shared(C_ema, C) == bool(g["alias_after"])
    C_ema.train()
    C_ema(x)
    close(before, g["buf_before"], dtype)
    close(C.batchnorm.running_mean, g["buf_after_teacher_fwd"], dtype, atol32=1e-5)


# -- 15 TRADES, RST, DM-Improves-AT ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "version", "ls"),
    [("trades", "trades", 0.0), ("rst", "rst", 0.0), ("dm_ls0.0", "dm", 0.0), ("dm_ls0.1", "dm", 0.1)],
)
def test_trades(golden, dtype, key, version, ls):
    g = golden["15_trades"]
    C: Classifier = nets_of(dtype).C.train()
    x, y = as_images(g["x"], dtype), torch.from_numpy(g["y"])
    recorded = g["noise"] if VERSIONS[version].init == "gauss" else (g["u"] + 1) / 2  # U[0,1) from U(-1,1)
    noise = RecordedNoise({"rae": [recorded]}, dtype=dtype)
    loss = trades_loss(C, x, y, beta=5, label_smoothing=ls, version=version, num_steps=3, noise=noise)
    loss.backward()
    close(loss, g[f"{key}.loss"], dtype)
    grads = {name: p.grad for name, p in C.named_parameters()}
    for name, array in arrays_of("C", g, f"{key}.grad.").items():
        # a sign of the attack that flips in float32 moves the gradient by more than its own rounding
        close(grads[name], array, dtype, rtol32=1e-2, atol32=5e-3 * float(array.abs().max()))
    assert_state(C, arrays_of("C", g, f"{key}.C_after."), dtype, atol32=1e-5)
