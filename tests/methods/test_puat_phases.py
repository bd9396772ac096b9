"""What each update of PUAT touches: gradients, modes, running statistics, power iterations (spec 1.5)."""

from __future__ import annotations

import pytest
import torch
from tiny_cases import LATE, B, K, Watch, equal_state, parameters, run_phase, tiny_batch, tiny_config, tiny_engine

from puat_fast.engine.step import Engine
from puat_fast.methods import Scalars
from puat_fast.networks import layers
from puat_fast.networks.layers import SpectralNorm, batch_norms

PRESETS = ["paper", "official-v1"]


def tracked(module: torch.nn.Module) -> int:
    """Train-mode updates of the running statistics so far; the same for all layers."""
    counts = {int(norm.num_batches_tracked) for norm in batch_norms(module)}
    assert len(counts) == 1
    return counts.pop()


def iterations(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the power iterations that every layer of D is asked for from now on, by name."""
    names = {id(m.u): name for name, m in engine.nets.D.named_modules() if isinstance(m, SpectralNorm)}
    counts = dict.fromkeys(names.values(), 0)
    plain = layers.spectral_norm

    def counted(weights, us, vs, *, iterations, **options):
        for u, n in zip(us, iterations, strict=True):
            counts[names[id(u)]] += n
        return plain(weights, us, vs, iterations=iterations, **options)

    monkeypatch.setattr(layers, "spectral_norm", counted)
    return counts


# -- whose gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("net", ["D", "G", "A", "C"])
def test_a_phase_trains_its_own_network_alone(preset, net):
    engine = tiny_engine(tiny_config(preset))
    before = {name: parameters(module) for name, module in engine.nets.items()}
    run_phase(engine, net, tiny_batch())
    for name, module in engine.nets.items():
        if name == net:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
            assert not equal_state(parameters(module), before[name])
        else:
            assert all(p.grad is None for p in module.parameters()), name
            assert equal_state(parameters(module), before[name]), name


def test_the_parts_of_a_loss_add_up():
    """What is backpropagated is the reported loss: the sum of the yielded parts."""
    for net in "DGAC":
        engine = tiny_engine(tiny_config())
        phase = next(p for p in engine.next_phases() if p.net == net)
        engine.on_step = lambda terms: None
        with engine.nets.training_only(net):
            total = sum(part.item() for part in phase.loss(tiny_batch(), Scalars(**LATE), 0))
        assert total == pytest.approx(float(engine._terms[f"{net}/loss"][0]), rel=1e-5)


def test_c_loss_is_the_sum_of_its_terms():
    terms = run_phase(tiny_engine(tiny_config()), "C", tiny_batch())
    assert terms["C/loss"] == pytest.approx(
        sum(terms[f"C/{t}"] for t in ("sup", "con", "fake", "uae", "rae")), rel=1e-5
    )


# -- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_modes_in_the_phases(preset):
    engine = tiny_engine(tiny_config(preset))
    expected = {"D": {"C": False, "G": True, "D": True}, "G": {"G": True, "D": True},
                "A": {"A": True, "G": True, "C": False}}  # fmt: skip
    for net, modes in expected.items():
        watches = {name: Watch(module) for name, module in engine.nets.items()}
        run_phase(engine, net, tiny_batch())
        for name, watch in watches.items():
            assert set(watch.training) == ({modes[name]} if name in modes else set()), (net, name)
        assert all(module.training for _, module in engine.nets.items())


def test_modes_in_the_phase_of_c():
    engine = tiny_engine(tiny_config("official-v1"))
    watches = {name: Watch(module) for name, module in engine.nets.items()}
    run_phase(engine, "C", tiny_batch())
    assert all(all(watch.training) and watch.training for watch in watches.values())


def test_d_and_a_leave_c_as_it_was():
    """No forward of the D, G and A phases updates C's statistics."""
    engine = tiny_engine(tiny_config("official-v1"))
    before = {k: v.clone() for k, v in engine.nets.C.state_dict().items()}
    for net in "DGA":
        run_phase(engine, net, tiny_batch())
    assert equal_state(engine.nets.C.state_dict(), before)


def test_d_sees_c_without_augmentation():
    noise_free = tiny_engine(tiny_config("paper", augment={"crop_pad": 4, "flip": True}))
    watch = Watch(noise_free.nets.C.init_conv)
    batch = tiny_batch()
    run_phase(noise_free, "D", batch)
    mean, std = noise_free.nets.C.mean, noise_free.nets.C.std
    assert torch.equal(watch.inputs[-1][0], (batch.D[0].x_u - mean) / std)


# -- how often ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "updates"), [("paper", 4), ("official-v1", 15)])
def test_updates_of_cs_statistics_in_a_whole_step(preset, updates):
    """UAE, x_l, x_u, RAE; in the official code also the pseudo-label forward and ten of PGD."""
    engine = tiny_engine(tiny_config(preset, attack={"num_steps": 10}, schedule={"n_disc": 5}))
    watch = Watch(engine.nets.C)
    engine.step(tiny_batch(n_disc=5))
    assert tracked(engine.nets.C) == updates
    assert sum(watch.training) == (15 if preset == "official-v1" else 14)
    assert tracked(engine.nets.C_ema) == 1


def test_frozen_attack_still_uses_batch_statistics():
    engine = tiny_engine(tiny_config("paper"))
    method, x, y = engine.method, torch.rand(B, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    engine.next_phases()
    before = {k: v.clone() for k, v in engine.nets.C.state_dict().items()}
    engine.noise.generator.manual_seed(0)
    frozen = method._rae(x, y)
    assert equal_state(engine.nets.C.state_dict(), before)
    results = {}
    for bn in ("train", "eval"):
        engine.config.rae.bn = bn
        engine.noise.generator.manual_seed(0)
        results[bn] = method._rae(x, y)
    assert torch.equal(frozen, results["train"])
    assert not torch.equal(frozen, results["eval"])


@pytest.mark.parametrize(("preset", "lookups"), [("paper", 1), ("official-v1", K)])
def test_power_iterations(preset, lookups, monkeypatch):
    """Per D update three forwards; the embedding is looked up 1 + 1 + K times under sn_per_class_lookup."""
    engine = tiny_engine(tiny_config(preset))
    counts = iterations(engine, monkeypatch)
    for net, forwards, embedding in (("D", 3, 2 + lookups), ("G", 1, 1), ("A", 0, 0), ("C", 1, lookups)):
        counts.update(dict.fromkeys(counts, 0))
        run_phase(engine, net, tiny_batch())
        expected = dict.fromkeys(counts, forwards) | {"embedding": embedding}
        assert counts == expected, net


def test_updates_of_gs_and_as_statistics():
    """G: once per D update, once in its own, twice (G(A(z)), G(z)) in the A and C updates; A: once in A, once in C."""
    engine = tiny_engine(tiny_config("paper", schedule={"n_disc": 5}))
    G, A, batch = engine.nets.G, engine.nets.A, tiny_batch(5)
    for net, g, a in (("D", 1, 0), ("G", 1, 0), ("A", 2, 1), ("C", 2, 1)):
        before = tracked(G), tracked(A)
        run_phase(engine, net, batch)
        assert (tracked(G) - before[0], tracked(A) - before[1]) == (g, a), net
    engine = tiny_engine(tiny_config("paper", schedule={"n_disc": 5}))
    engine.step(batch)
    assert (tracked(engine.nets.G), tracked(engine.nets.A)) == (5 + 1 + 2 + 2, 2)


def test_z_a_goes_through_g_before_z():
    engine = tiny_engine(tiny_config("paper"))
    A, G = Watch(engine.nets.A), Watch(engine.nets.G)
    run_phase(engine, "A", tiny_batch())
    assert torch.equal(G.inputs[0][0], A.outputs[0]) and torch.equal(G.inputs[1][0], A.inputs[0][0])


def test_labels_of_the_g_and_a_updates_are_those_of_the_last_d_batch():
    engine, batch = tiny_engine(tiny_config("paper", schedule={"n_disc": 3})), tiny_batch(3)
    for net in "GA":
        watch = Watch(engine.nets.G)
        run_phase(engine, net, batch)
        assert all(torch.equal(labels, batch.D[-1].y_l) for _, labels in watch.inputs)


def test_each_update_of_d_takes_its_own_batch():
    engine, batch = tiny_engine(tiny_config("paper", schedule={"n_disc": 3})), tiny_batch(3)
    watch = Watch(engine.nets.D)
    engine.step(batch)
    all_classes = [inputs[0] for inputs in watch.inputs if len(inputs) == 1]
    assert [torch.equal(x, b.x_u) for x, b in zip(all_classes, batch.D, strict=False)] == [True] * 3
    assert torch.equal(all_classes[3], batch.C.x_u)


def test_fresh_z_in_every_phase():
    engine = tiny_engine(tiny_config("paper", schedule={"n_disc": 2}))
    G, A = Watch(engine.nets.G), Watch(engine.nets.A)
    engine.step(tiny_batch(2))
    z = [inputs[0] for inputs in (*G.inputs[:3], *A.inputs)]  # 2 D, G, then A and C
    assert len({tuple(row.flatten().tolist()) for row in z}) == 5


# -- stages ---------------------------------------------------------------------------------------------------------


def test_stage_1_trains_c_then_d_g_and_c_and_never_a():
    engine = tiny_engine(tiny_config("paper", pretrain={"gan_start": 2}), stage=1)
    A = parameters(engine.nets.A)
    nets = {e: "".join(p.net for p in engine.method.phases(1, e)) for e in (1, 2, 3)}
    assert nets == {1: "C", 2: "DGC", 3: "DGC"}
    for seed in range(4):
        engine.step(tiny_batch(seed=seed))
    assert equal_state(parameters(engine.nets.A), A)
    assert not engine.optimizers["A"].state


def test_stage_1_makes_no_adversarial_term():
    engine = tiny_engine(tiny_config("paper"), stage=1)
    watch = Watch(engine.nets.C)
    terms = run_phase(engine, "C", tiny_batch(), adv_ramp=0.0)
    assert set(terms) == {"C/loss", "C/sup", "C/con", "C/clean_acc"}
    assert len(watch.inputs) == 2  # x_l, and x_m of its own


def test_without_pretraining_there_is_stage_2_only():
    engine = tiny_engine(tiny_config("paper", pretrain={"epochs": 0}))
    assert (engine.method.stages, engine.stage) == ((2,), 2)


def test_before_adv_start_nothing_adversarial_happens():
    engine = tiny_engine(tiny_config("paper", schedule={"adv_start": 3, "adv_end": 4}))
    assert "A" not in [p.net for p in engine.next_phases()]
    engine.on_step = lambda terms: seen.append(set(terms))
    seen: list[set[str]] = []
    engine.step(tiny_batch())
    assert not seen[0] & {"C/uae", "C/rae", "C/fake", "A/loss"}
