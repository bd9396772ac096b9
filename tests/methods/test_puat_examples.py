"""The images PUAT trains on: mixed batch, UAEs, RAEs, and the variant without unlabelled data (spec 1.3)."""

from __future__ import annotations

import pytest
import torch
from tiny_cases import B, K, Watch, run_phase, tiny_batch, tiny_config, tiny_engine

from puat_fast.data.batch import DiscBatch, SemiBatch

EPS = 8 / 255


def inside(x: torch.Tensor, center: torch.Tensor, eps: float = EPS) -> bool:
    return bool(((x - center).abs() <= eps + 1e-6).all() and x.min() >= 0 and x.max() <= 1)


# -- mixed batches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mix_frac", "n_u"), [(0.9, 230), (0.6, 153), (0.5, 128), (0.0, 0), (1.0, 256)])
def test_mix_frac_is_truncated(mix_frac, n_u):
    """int(256 * .9) = 230 and int(256 * .6) = 153 (spec 5.2, 2): in the mixed batch and in D's real batch."""
    engine = tiny_engine(tiny_config("paper", data={"mix_frac": mix_frac}))
    images = torch.arange(256.0).div(255).view(256, 1, 1, 1).expand(-1, 3, 32, 32)
    y = torch.zeros(256, dtype=torch.int64)
    logits_u = torch.zeros(256, K).index_fill(1, torch.tensor([2]), 1.0)
    x_m, y_m = engine.method._mixed(SemiBatch(images, y, 1 - images), logits_u)
    n_l = 256 - n_u
    assert torch.equal(x_m, torch.cat([images[:n_l], (1 - images)[n_l:]]))
    assert y_m.tolist() == [0] * n_l + [2] * n_u
    engine.nets.C.eval()
    with torch.no_grad():
        engine.nets.C.logits.bias[1] = 1e4
        b = DiscBatch(images, y, None, 1 - images)
        x_r, y_r = engine.method._real_for_d(b, engine.nets.C(engine.method._x_ud(b)))
    assert torch.equal(x_r, torch.cat([images[:n_l], (1 - images)[:n_u]]))
    assert y_r.tolist() == [0] * n_l + [1] * n_u


def test_rows_of_the_mixed_batch_have_their_own_labels():
    """y_m of an unlabelled row is the prediction for that very row."""
    engine = tiny_engine(tiny_config())
    b = tiny_batch().C
    logits = torch.eye(K)[[2, 0, 1, 2]] * 5
    x_m, y_m = engine.method._mixed(b, logits)
    assert torch.equal(x_m, torch.cat([b.x_l[:2], b.x_u[2:]]))
    assert y_m.tolist() == [*b.y_l[:2].tolist(), 1, 2]


def test_the_teacher_sees_the_mixed_batch():
    engine, batch = tiny_engine(tiny_config()), tiny_batch()
    watch = Watch(engine.nets.C_ema)
    run_phase(engine, "C", batch)
    assert torch.equal(watch.inputs[0][0], torch.cat([batch.C.x_l[:2], batch.C.x_u[2:]]))


# -- UAEs -----------------------------------------------------------------------------------------------------------


def test_uaes_lie_in_the_ball_around_g_of_z():
    engine = tiny_engine(tiny_config("paper", attacker={"clip": 5}))
    C, G = Watch(engine.nets.C), Watch(engine.nets.G)
    run_phase(engine, "C", tiny_batch())
    x_uae, x_g = C.inputs[0][0], G.outputs[1]
    assert inside(x_uae, x_g)
    assert (x_uae - x_g).abs().max() > 0.9 * EPS  # the ball is what holds them
    assert (G.outputs[0] - x_g).abs().max() > 2 * EPS


@pytest.mark.parametrize("net", ["A", "C"])
def test_project_eps_null_lets_uaes_go(net):
    engine = tiny_engine(tiny_config("paper", attacker={"clip": 5}, uae={"project_eps": None}))
    C, G = Watch(engine.nets.C), Watch(engine.nets.G)
    run_phase(engine, net, tiny_batch())
    assert torch.equal(C.inputs[0][0], G.outputs[0])


def test_project_eps_sets_the_radius():
    engine = tiny_engine(tiny_config("paper", attacker={"clip": 5}, uae={"project_eps": 0.01}))
    C, G = Watch(engine.nets.C), Watch(engine.nets.G)
    run_phase(engine, "A", tiny_batch())
    assert (C.inputs[0][0] - G.outputs[1]).abs().max().item() == pytest.approx(0.01, abs=1e-6)


# -- RAEs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["mixed", "labelled"])
@pytest.mark.parametrize("init", ["gauss", "uniform"])
def test_raes_lie_in_the_ball_around_their_images(source, init):
    engine, batch = tiny_engine(tiny_config("paper", rae={"source": source, "init": init})), tiny_batch()
    C = Watch(engine.nets.C)
    run_phase(engine, "C", batch)
    center = batch.C.x_l if source == "labelled" else torch.cat([batch.C.x_l[:2], batch.C.x_u[2:]])
    x_rae = C.inputs[-1][0]
    assert inside(x_rae, center)
    assert not torch.equal(x_rae, center)
    other = batch.C.x_u if source == "labelled" else batch.C.x_l
    assert not inside(x_rae, other)


def test_eps_and_steps_of_the_attack():
    engine, batch = (
        tiny_engine(tiny_config("paper", attack={"eps": 0.02, "step_size": 0.02, "num_steps": 5})),
        tiny_batch(),
    )
    C = Watch(engine.nets.C)
    run_phase(engine, "C", batch)
    assert len(C.inputs) == 3 + 5 + 1
    x_m = torch.cat([batch.C.x_l[:2], batch.C.x_u[2:]])
    assert (C.inputs[-1][0] - x_m).abs().max().item() == pytest.approx(0.02, abs=1e-6)


def test_no_rae_weight_no_attack():
    engine = tiny_engine(tiny_config("paper", loss={"rae_weight": 0}))
    C = Watch(engine.nets.C)
    terms = run_phase(engine, "C", tiny_batch())
    assert len(C.inputs) == 3 and terms["C/rae"] == 0


# -- without unlabelled data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "official-v1"])
@pytest.mark.parametrize("stage", [1, 2])
def test_without_unlabelled_data_every_phase_runs(preset, stage):
    engine = tiny_engine(tiny_config(preset, data={"use_unlabelled": False}, pretrain={"gan_start": 1}), stage=stage)
    C, D = Watch(engine.nets.C), Watch(engine.nets.D)
    engine.step(tiny_batch(unlabelled=False))
    assert engine.stats.read()["C/loss"] > 0
    assert {len(inputs[0]) for inputs in (*C.inputs, *D.inputs)} == {2 * B}


@pytest.mark.parametrize("relabel", [False, True])
def test_relabel_labelled(relabel):
    """The official code trains on predicted labels even of labelled images."""
    config = tiny_config("paper", data={"use_unlabelled": False}, pseudo={"relabel_labelled": relabel})
    engine, b = tiny_engine(config), tiny_batch(unlabelled=False).C
    wrong = (b.y_l + 1) % K
    x_m, y_m = engine.method._mixed(b, torch.eye(K)[wrong])
    assert torch.equal(x_m, b.x_l)
    expected = torch.cat([b.y_l[:B], wrong[B:]]) if relabel else b.y_l
    assert torch.equal(y_m, expected)
