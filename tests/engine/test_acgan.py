"""Training of the AC-GAN: its losses by hand, what a run writes, resuming, and what it must leave alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_cases import tiny_dataset

from puat_fast import cli
from puat_fast import objectives as L
from puat_fast.attacks.acgan_file import load_acgan
from puat_fast.config import Config, ConfigError
from puat_fast.engine import acgan as module
from puat_fast.engine.acgan import AcganTrainer
from puat_fast.engine.stats import NonFiniteError
from puat_fast.engine.trainer import Trainer


def config(out, **options):
    small = {"epochs": 2, "batch_size": 8, "width": 2, "z_dim": 5} | options
    return Config.preset("paper", method="acgan", out=str(out), device="cpu", acgan=small, log={"interval": 1})


def trainer(out, resume=None, **options):
    return AcganTrainer(config(out, **options), resume, dataset=tiny_dataset(3))


def weights(trained):
    return torch.cat([t.double().flatten() for net in (trained.G, trained.D) for t in net.state_dict().values()])


def test_loss_is_binary_cross_entropy_and_label_likelihood():
    validity, label = torch.tensor([0.9, 0.2]).double(), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).double().log()
    expected = -(0.8 * np.log(0.9) + 0.2 * np.log(0.1) + 0.8 * np.log(0.2) + 0.2 * np.log(0.8)) / 2
    expected -= (np.log(0.7) + np.log(0.8)) / 2
    assert L.acgan(validity, label, 0.8, torch.tensor([0, 2])).item() == pytest.approx(expected, rel=1e-6)
    label, y = label.float(), torch.tensor([0, 2])
    for value in (0.0, 1.0):  # as torch's, which takes -100 for log(0)
        validity = torch.tensor([value, 0.3])
        expected = F.binary_cross_entropy(validity, torch.full((2,), 0.7)) + F.nll_loss(label, y)
        assert L.acgan(validity, label, 0.7, y).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("step, swapped", [(7, False), (25, True)])
def test_one_update_is_two_adam_steps_on_these_losses(tmp_path, monkeypatch, step, swapped):
    ours = trainer(tmp_path / "a")
    G, D = (type(net)(3, **kw) for net, kw in ((ours.G, {"z_dim": 5, "width": 2}), (ours.D, {"width": 2})))
    G.load_state_dict(ours.G.state_dict()), D.load_state_dict(ours.D.state_dict())
    adams = [torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in (G, D)]
    x, y = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    ours.step = step
    real, fake = ours.targets[0][step % 10], ours.targets[1][step % 10]
    torch.manual_seed(4)
    ours.update(x, y)

    torch.manual_seed(4)  # the same draws by hand: labels, latents, D's dropout on real, on generated, and for G
    y_fake, z = torch.randint(3, (8,)), None
    z = torch.randn(8, 5)
    large = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    made = G(z, y_fake)
    t_real, t_fake = (fake, real) if swapped else (real, fake)
    valid, told = D(large)
    loss = F.binary_cross_entropy(valid, torch.full((8,), t_real)) + F.nll_loss(told, y)
    valid, told = D(made.detach())
    loss = loss + F.binary_cross_entropy(valid, torch.full((8,), t_fake)) + F.nll_loss(told, torch.full((8,), 3))
    loss.backward()
    adams[1].step()
    valid, told = D(made)
    loss_G = F.binary_cross_entropy(valid, torch.ones(8)) + F.nll_loss(told, y_fake)
    adams[0].zero_grad(), loss_G.backward(), adams[0].step()
    for net, by_hand in ((ours.G, G), (ours.D, D)):
        for (name, a), b in zip(net.state_dict().items(), by_hand.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_targets_are_ten_of_each_and_never_above_one(tmp_path):
    real, fake = trainer(tmp_path / "a").targets
    assert len(real) == len(fake) == 10
    assert all(0.7 <= t <= 1 for t in real) and max(real) == 1 and all(0 <= t <= 0.3 for t in fake)


def test_a_run_writes_weights_pictures_and_metrics_and_leaves_the_global_generator(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    done = trainer(tmp_path / "a")
    run = done.fit()
    assert torch.equal(torch.get_rng_state(), before)
    assert run.path == tmp_path / "a" and 0 <= run.summary["label_agreement"] <= 1
    assert (tmp_path / "a/samples/epoch002.png").exists() and (tmp_path / "a/checkpoints/last.pt").exists()
    rows = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2] and {"D/loss", "G/loss", "G/label_acc"} <= rows[0].keys()
    loaded = load_acgan(run.path)
    assert loaded.dataset == done.dataset.name and loaded.class_names == done.dataset.class_names
    assert not loaded.G.training and not any(p.requires_grad for p in loaded.D.parameters())
    z, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    assert torch.equal(loaded.G(z, y), done.G.eval()(z, y)) and torch.equal(
        load_acgan(run.path).G(z, y), loaded.G(z, y)
    )


def test_two_runs_agree_and_a_resumed_one_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    straight, again = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    straight.fit(), again.fit()
    assert torch.equal(weights(straight), weights(again))
    stopped = trainer(tmp_path / "c")
    step = stopped._step

    def interrupted():
        step()
        if stopped.step == straight.steps_per_epoch + 1:  # in the middle of the second epoch
            stopped._save()
            raise KeyboardInterrupt

    monkeypatch.setattr(stopped, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    continued = trainer(tmp_path / "c", "auto")
    continued.fit()
    assert torch.equal(weights(continued), weights(straight))
    same = [(tmp_path / name / "metrics.csv").read_text().splitlines()[1].split(",")[:6] for name in "ac"]
    assert same[0] == same[1]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = trainer(tmp_path / "a", lr=1e30)
    with pytest.raises(NonFiniteError, match=r"[DG]/loss is not finite by step"):
        broken.fit()


def test_other_trainers_and_processes_are_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"method: acgan is trained by puat_fast.engine.acgan.AcganTrainer"):
        Trainer(config(tmp_path / "a"), dataset=tiny_dataset(3))
    monkeypatch.setattr(module.distributed, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="method: acgan trains on one device"):
        trainer(tmp_path / "a")


def test_broken_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such AC-GAN; `puat-fast train --method acgan` makes one"):
        load_acgan(tmp_path)
    for content in (b"", b"nothing of the kind"):
        (tmp_path / "acgan.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"acgan.safetensors: broken, or not an AC-GAN"):
            load_acgan(tmp_path)


def test_command_line(tmp_path, capsys):
    out = tmp_path / "a"
    options = ["--acgan.epochs", "1", "--acgan.width", "1", "--acgan.batch_size", "512", "--acgan.z_dim", "4"]
    assert cli.main(["train", "--method", "acgan", "--out", str(out), "--device", "cpu", *options]) == 0
    shown = capsys.readouterr().out
    assert "label head agrees with" in shown and shown.rstrip().endswith("acgan.safetensors") and "pgd-8" not in shown
