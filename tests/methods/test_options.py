"""Every option of spec 1.10 changes what it says, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_cases import B, K, Watch, parameters, run_phase, tiny_batch, tiny_config, tiny_engine

from puat_fast import objectives as L
from puat_fast.engine.step import Engine
from puat_fast.noise import Noise


def with_option(preset: str = "paper", **options: Any) -> Engine:
    engine = tiny_engine(tiny_config(preset, **options))
    with torch.no_grad():  # a teacher unlike its student
        for p in engine.nets.C_ema.parameters():
            p.mul_(0.8)
    return engine


def c_terms(**options: Any) -> dict[str, float]:
    return run_phase(with_option(**options), "C", tiny_batch())


def differing(a: dict[str, float], b: dict[str, float]) -> set[str]:
    return {name for name in a if a[name] != pytest.approx(b[name], rel=1e-5, abs=1e-9)}


# -- weights of the terms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "term", "factor"),
    [
        ({"loss": {"rae_weight_mode": "lambda_times"}}, "C/rae", 10),
        ({"loss": {"rae_weight": 3}}, "C/rae", 0.5),
        ({"loss": {"gamma": 1}}, "C/fake", 1 / 0.03),
        ({"loss": {"gamma": 0}}, "C/fake", 0),
        ({"loss": {"uae_weight": 20}}, "C/uae", 2),
        ({"consistency": {"reduce": "sum"}}, "C/con", K),
    ],
)
def test_weights(options, term, factor):
    plain, changed = c_terms(), c_terms(**options)
    assert changed[term] == pytest.approx(factor * plain[term], rel=1e-5)
    assert plain[term] != 0
    assert differing(plain, changed) == {term, "C/loss"}


def test_lambda_times_couples_rae_to_lambda():
    """official-v1: lambda = 0 also removes the RAEs (spec 5.3 e); additive keeps them."""
    off = {"uae_weight": 0}
    assert c_terms(loss=off)["C/rae"] > 0
    assert c_terms(loss=off | {"rae_weight_mode": "lambda_times"})["C/rae"] == 0


def test_ramp_and_consistency_weight_scale_their_terms():
    one = run_phase(with_option(), "C", tiny_batch(), adv_ramp=0.25, consistency_weight=50)
    two = run_phase(with_option(), "C", tiny_batch(), adv_ramp=0.5, consistency_weight=100)
    for term in ("C/uae", "C/rae", "C/fake", "C/con"):
        assert two[term] == pytest.approx(2 * one[term], rel=1e-5)
    assert two["C/sup"] == one["C/sup"]


def test_label_smoothing_enters_the_losses_of_c():
    engine, batch = with_option(loss={"label_smoothing": 0.3}), tiny_batch()
    C = Watch(engine.nets.C)
    terms = run_phase(engine, "C", batch)

    def smooth(logits: torch.Tensor, y: torch.Tensor) -> float:
        log_p = logits.log_softmax(1)
        return float((0.7 * -log_p[torch.arange(B), y] + 0.3 * -log_p.mean(1)).mean())

    y_m = torch.cat([batch.C.y_l[:2], C.outputs[2].argmax(1)[2:]])
    assert terms["C/sup"] == pytest.approx(smooth(C.outputs[1], batch.C.y_l), rel=1e-5)
    assert terms["C/uae"] == pytest.approx(0.5 * 10 * smooth(C.outputs[0], batch.C.y_l), rel=1e-5)
    assert terms["C/rae"] == pytest.approx(0.5 * 6 * smooth(C.outputs[-1], y_m), rel=1e-5)


def test_label_smoothing_enters_no_attack():
    plain, smooth = (with_option(loss={"label_smoothing": s}) for s in (0.0, 0.3))
    assert run_phase(plain, "A", tiny_batch()) == run_phase(smooth, "A", tiny_batch())
    x, y = torch.rand(B, 3, 32, 32), torch.tensor([0, 1, 2, 1])
    for engine in (plain, smooth):
        engine.noise.generator.manual_seed(0)
    assert torch.equal(plain.method._rae(x, y), smooth.method._rae(x, y))


# -- sources --------------------------------------------------------------------------------------------------------


def test_consistency_source():
    engine, batch = with_option(consistency={"source": "unlabelled"}), tiny_batch()
    C, C_ema = Watch(engine.nets.C), Watch(engine.nets.C_ema)
    terms = run_phase(engine, "C", batch)
    assert torch.equal(C_ema.inputs[0][0], batch.C.x_u)
    expected = 50 * L.consistency(C.outputs[2], C_ema.outputs[0])
    assert terms["C/con"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("source", ["mixed", "unlabelled"])
def test_consistency_source_in_stage_1(source):
    engine, batch = tiny_engine(tiny_config(consistency={"source": source}), stage=1), tiny_batch()
    watches = [Watch(engine.nets.C), Watch(engine.nets.C_ema)]
    run_phase(engine, "C", batch, adv_ramp=0)
    x_m = torch.cat([batch.C.x_l[:2], batch.C.x_u[2:]])
    for watch in watches:
        assert torch.equal(watch.inputs[-1][0], x_m if source == "mixed" else batch.C.x_u)


def test_consistency_pairs_each_image_with_itself():
    """Student probabilities come from two forwards, the teacher's from one: the rows must match."""
    engine, batch = with_option(), tiny_batch()
    C, C_ema = Watch(engine.nets.C), Watch(engine.nets.C_ema)
    terms = run_phase(engine, "C", batch)
    student = torch.cat([C.outputs[1][:2], C.outputs[2][2:]])
    expected = 50 * (student.softmax(1) - C_ema.outputs[0].softmax(1)).square().mean()
    assert terms["C/con"] == pytest.approx(float(expected), rel=1e-5)


def test_rae_source_labels():
    """labelled: eq 17, attacked and trained with the true labels."""
    engine, batch = with_option(rae={"source": "labelled"}), tiny_batch()
    C = Watch(engine.nets.C)
    terms = run_phase(engine, "C", batch)
    expected = 0.5 * 6 * L.cross_entropy(C.outputs[-1], batch.C.y_l, 0.1)
    assert terms["C/rae"] == pytest.approx(float(expected), rel=1e-5)


def test_rae_accuracy_labels_change_the_log_alone():
    plain, v1 = c_terms(), c_terms(rae={"accuracy_labels": "y_l"})
    assert differing(plain, v1) <= {"C/rae_acc"}


@pytest.mark.parametrize(("init", "kind"), [("gauss", "normal"), ("uniform", "uniform")])
def test_rae_init(init, kind, monkeypatch):
    engine, drawn = with_option(rae={"init": init}, attack={"num_steps": 0}), []
    for name in ("normal", "uniform"):
        draw = getattr(Noise, name)
        monkeypatch.setattr(
            Noise, name, lambda self, n, shape, name=name, draw=draw: drawn.append((name, n)) or draw(self, n, shape)
        )
    x = torch.rand(B, 3, 32, 32)
    start = engine.method._rae(x, torch.zeros(B, dtype=torch.int64))
    assert drawn == [(kind, "rae")]
    delta = start - x
    if init == "gauss":
        assert delta.std().item() == pytest.approx(0.001, rel=0.05)
    else:
        inner = ((x > 0.1) & (x < 0.9)).logical_and(delta.abs() > 0)
        assert delta.abs().max() <= 8 / 255 + 1e-6 and start.min() >= 0 and start.max() <= 1
        assert delta[inner].std().item() == pytest.approx(8 / 255 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(
    ("bn", "training", "updates"), [("train_frozen", True, 4), ("train", True, 7), ("eval", False, 4)]
)
def test_rae_bn(bn, training, updates):
    engine = with_option(rae={"bn": bn})
    C = Watch(engine.nets.C)
    run_phase(engine, "C", tiny_batch())
    assert C.training == [True] * 3 + [training] * 3 + [True]
    assert int(engine.nets.C.batchnorm.num_batches_tracked) == updates
    assert engine.nets.C.training


@pytest.mark.parametrize(("forward", "training"), [("reuse", []), ("extra", [True]), ("eval", [False])])
def test_pseudo_forward(forward, training):
    engine, batch = with_option(pseudo={"forward": forward}), tiny_batch()
    C = Watch(engine.nets.C)
    with torch.no_grad():
        engine.nets.C.logits.bias[0] = 100  # all predictions alike: y_m is known
    terms = run_phase(engine, "C", batch)
    assert C.training == [True] * 3 + training + [True] * 4
    if training:
        assert torch.equal(C.inputs[3][0], batch.C.x_u)
    y_m = torch.cat([batch.C.y_l[:2], torch.zeros(2, dtype=torch.int64)])
    expected = 0.5 * 6 * L.cross_entropy(C.outputs[-1], y_m, 0.1)
    assert terms["C/rae"] == pytest.approx(float(expected), rel=1e-5)


# -- UAEs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.1, 0.7])
def test_attacker_clip(clip):
    engine = with_option(attacker={"clip": clip})
    torch.nn.init.normal_(engine.nets.A.linear_out.weight, std=100)
    A = Watch(engine.nets.A)
    run_phase(engine, "A", tiny_batch())
    assert (A.outputs[0] - A.inputs[0][0]).abs().max().item() == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("share", [True, False])
def test_share_z(share):
    engine = with_option(uae={"share_z": share})
    A, G = Watch(engine.nets.A), Watch(engine.nets.G)
    engine.step(tiny_batch())
    z_of_g = G.inputs[1][0]  # after that of the one D update
    assert [torch.equal(inputs[0], z_of_g) for inputs in A.inputs] == [share, share]


@pytest.mark.parametrize(("flag", "epoch", "training"), [(True, 1, True), (True, 2, False), (False, 2, True)])
def test_attacker_eval_after_first_epoch(flag, epoch, training):
    engine = with_option(attacker={"eval_after_first_epoch": flag})
    engine.step_in_stage = engine.steps_per_epoch * (epoch - 1)
    A = Watch(engine.nets.A)
    before = engine.nets.A.blocks[0].cbn1.bn.running_mean.clone()
    weight = engine.nets.A.linear_out.weight.detach().clone()
    engine.step(tiny_batch())
    assert set(A.training) == {training}
    assert not torch.equal(engine.nets.A.linear_out.weight, weight)  # frozen are its statistics, not its weights
    assert torch.equal(engine.nets.A.blocks[0].cbn1.bn.running_mean, before) is not training


# -- schedule, networks, optimisers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["DGAC", "DACG", "CAGD"])
def test_order(order):
    engine, seen = with_option(schedule={"order": order}), []
    update = engine._update
    engine._update = lambda phase, *a: seen.append(phase.net) or update(phase, *a)
    engine.step(tiny_batch())
    assert "".join(seen) == order


@pytest.mark.parametrize("n_disc", [1, 3])
def test_n_disc(n_disc):
    engine = with_option(schedule={"n_disc": n_disc})
    assert engine.num_disc_batches() == n_disc
    engine.step(tiny_batch(n_disc))
    steps = {name: {int(s["step"]) for s in engine.optimizers[name].state.values()} for name in "DGA"}
    assert steps == {"D": {n_disc}, "G": {1}, "A": {1}}


@pytest.mark.parametrize("gan_start", [1, 3])
def test_gan_start(gan_start):
    engine = tiny_engine(tiny_config(pretrain={"gan_start": gan_start}), stage=1)
    nets = ["".join(p.net for p in engine.method.phases(1, e)) for e in range(1, 5)]
    assert nets == ["C"] * (gan_start - 1) + ["DGC"] * (5 - gan_start)
    assert engine.num_disc_batches() == (1 if gan_start == 1 else 0)


def test_gan_width_and_z_dim():
    engine = with_option(gan={"width": 12, "z_dim": 6})
    assert engine.nets.G.linear.weight.shape == (16 * 12, 6)
    assert engine.nets.D.linear.weight.shape == (1, 12)
    engine.step(tiny_batch())


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_augment_scope(scope):
    class Spy(Noise):
        def uniform(self, name, shape):
            shapes.add((name, tuple(shape)))
            return super().uniform(name, shape)

    shapes: set = set()
    engine = tiny_engine(tiny_config(augment={"crop_pad": 4, "flip": True, "rotate_deg": 5, "scope": scope}), Spy(0))
    run_phase(engine, "C", tiny_batch())
    n = B if scope == "image" else 1
    assert shapes == {(f"augment/{name}", (n, 1)) for name in ("top", "left", "flip", "angle")}


def test_every_train_mode_forward_of_c_and_its_teacher_augments_anew():
    class Spy(Noise):
        def uniform(self, name, shape):
            names.append(name)
            return super().uniform(name, shape)

    names: list[str] = []
    engine = tiny_engine(
        tiny_config("official-v1", augment={"crop_pad": 4, "flip": True}, attack={"num_steps": 10}), Spy(0)
    )
    run_phase(engine, "C", tiny_batch())
    assert names.count("augment/top") == 15 + 1
    names.clear()
    run_phase(engine, "D", tiny_batch()), run_phase(engine, "A", tiny_batch())
    assert names == []  # C is in eval mode there


@pytest.mark.parametrize("decay_bn", [False, True])
def test_decay_bn(decay_bn):
    """One SGD step with zero gradients shrinks exactly what is decayed."""
    engine = with_option(optim={"decay_bn": decay_bn, "weight_decay": 0.1})
    C, optimizer = engine.nets.C, engine.optimizers["C"]
    with torch.no_grad():
        for p in C.parameters():
            p.fill_(1)
            p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = 1.0, 0.0
        group["nesterov"] = False
    optimizer.step()
    for name, p in C.named_parameters():
        spared = "batchnorm" in name and not decay_bn
        assert torch.allclose(p, torch.tensor(1.0 if spared else 0.9)), name


def test_the_two_presets_differ_where_the_spec_says():
    paper, v1 = (tiny_config(p) for p in ("paper", "official-v1"))
    for key, values in {
        "loss.rae_weight_mode": ("additive", "lambda_times"),
        "loss.gamma": (0.03, 1.0),
        "loss.label_smoothing": (0.1, 0.1),
        "rae.bn": ("train_frozen", "train"),
        "rae.init": ("gauss", "gauss"),
        "pseudo.forward": ("reuse", "extra"),
        "augment.scope": ("image", "batch"),
        "ema.bn": ("copy", "shared"),
        "attacker.eval_after_first_epoch": (False, True),
        "pretrain.exclude_validation": (True, False),
        "gan.sn_per_class_lookup": (False, True),
        "schedule.order": ("DGAC", "DGAC"),
        "ema.reset_on_stage2": (True, True),
        "optim.cycle_momentum": (True, True),
    }.items():
        assert (paper.get(key), v1.get(key)) == values, key


def test_an_engine_is_decided_by_its_seed():
    a, b = with_option(), with_option()
    other = with_option(seed=2)
    for engine in (a, b, other):
        engine.step(tiny_batch())
    assert all(torch.equal(p, q) for p, q in zip(parameters(a.nets.C), parameters(b.nets.C), strict=True))
    assert not torch.equal(parameters(a.nets.C)[0], parameters(other.nets.C)[0])
