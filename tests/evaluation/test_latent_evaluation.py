"""GPGD and USong in `eval`: names, counts by hand, modes, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from puat_fast import cli
from puat_fast.attacks import gpgd
from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator, told_class
from puat_fast.attacks.acgan_file import AcGan, save_acgan
from puat_fast.evaluation import latent
from puat_fast.evaluation.names import AttackSpec, parse_attack
from puat_fast.noise import Noise

K = 10


class Mean(nn.Module):
    """Ten classes by the image's brightness, as even as the generator's images are."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        z, y = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)), torch.arange(500) % K
        with torch.no_grad():
            bright = generator(z, y).flatten(1).mean(1)
        self.centres = nn.Parameter(bright.quantile(torch.linspace(0.05, 0.95, K)))
        self.scale = 10 / bright.std().item() ** 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -((x.flatten(1).mean(1, keepdim=True) - self.centres) ** 2) * self.scale


@pytest.fixture
def acgan():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        G, D = AcGenerator(K, z_dim=6, width=2).eval(), AcDiscriminator(K, width=2).eval()
    return AcGan(G, D, "digits", tuple("0123456789"))


def test_names():
    assert parse_attack("gpgd-0.10") == AttackSpec(name="gpgd-0.1", kind="gpgd", eps=0.1, step_size=0.1, num_steps=20)
    assert parse_attack("usong") == AttackSpec(
        name="usong", kind="usong", eps=0.01, step_size=0.1, num_steps=200, draws=10
    )
    for name in ("gpgd", "gpgd-0", "gpgd-11", "gpgd-x", "usongs"):
        with pytest.raises(ValueError, match=f"attacks: '{name}' is not one of clean"):
            parse_attack(name)


def test_counts_are_those_of_the_attack_by_hand(acgan):
    y, model, spec = torch.arange(30) % K, Mean(acgan.G), parse_attack("gpgd-3")
    found = latent.evaluate(model, acgan, y, spec, batch_size=30, seed=3)
    by_hand = gpgd(model, acgan.G, y, eps=3.0, noise=Noise(3))
    right = [(model(x).argmax(1) == y).sum().item() for x in (by_hand.x_adv, by_hand.x_nat)]
    images = (by_hand.generated_nat, by_hand.generated_adv)
    agree = [(told_class(acgan.D(x)[1]) == y).sum().item() for x in images]
    assert found["correct"] == right[0] and found["n"] == 30 and found["accuracy"] == right[0] / 30
    assert [round(30 * found[key]) for key in ("generated_acc", "agreement", "agreement_adv")] == [right[1], *agree]
    assert right[0] < right[1]  # it is an attack


def test_every_label_is_drawn_so_often_and_batches_go_on_in_the_stream(acgan):
    told = []
    spec = AttackSpec(name="usong", kind="usong", eps=0.1, step_size=0.1, num_steps=2, draws=3)
    found = latent.evaluate(
        Mean(acgan.G), acgan, torch.arange(8), spec, batch_size=10, progress=lambda *args: told.append(args)
    )
    assert found["n"] == 24 and [args[1:3] for args in told] == [(0, 24), (10, 24), (20, 24), (24, 24)]
    assert latent.evaluate(Mean(acgan.G), acgan, torch.arange(8), spec, batch_size=10) | {"seconds": 0} == found | {
        "seconds": 0
    }


@pytest.mark.parametrize("name", ["gpgd-3", "usong"])
def test_bf16_is_of_the_classifier_alone(acgan, name):
    spec = dataclasses.replace(parse_attack(name), num_steps=3, draws=1)
    model, y = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, K)), torch.arange(20) % K
    exact, rounded = (latent.evaluate(model, acgan, y, spec, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded["precision"] == "bf16" and rounded["n"] == 20
    for key in ("generated_acc", "agreement"):  # of the images before the search
        assert rounded[key] == exact[key]


@pytest.mark.parametrize("compat", ["none", "official-v1"])
def test_modes_come_back(acgan, compat):
    model, modes = Mean(acgan.G), []
    acgan.G.register_forward_hook(lambda net, *_: modes.append(net.training))
    latent.evaluate(model, acgan, torch.arange(4), parse_attack("gpgd-0.1"), batch_size=2, compat=compat)
    assert set(modes) == {compat == "official-v1"}
    assert not acgan.G.training and not acgan.D.training


def test_start_and_antialias_are_those_of_the_attack(acgan, monkeypatch):
    asked = []
    monkeypatch.setattr(latent, "gpgd", lambda *args, **options: asked.append(options) or gpgd(*args, **options))
    spec, y = parse_attack("gpgd-0.1"), torch.arange(4)
    found = latent.evaluate(Mean(acgan.G), acgan, y, spec, start="image", antialias=True)
    (options,) = asked
    assert options["start"] == found["start"] == "image" and options["antialias"] is found["antialias"] is True


def test_what_is_refused(acgan, tmp_path):
    with pytest.raises(ValueError, match="acgan: gpgd and usong search an AC-GAN's latent space"):
        latent.load_acgan_for(None, torch.device("cpu"), K)
    save_acgan(tmp_path / "acgan.safetensors", acgan)
    with pytest.raises(ValueError, match="makes 10 classes, the classifier knows 7"):
        latent.load_acgan_for(tmp_path, torch.device("cpu"), 7)


def test_command_line(acgan, tmp_path, capsys):
    from puat_fast import checkpoint
    from puat_fast.config import Config
    from puat_fast.networks import build_classifier

    config = Config.preset("paper", classifier={"depth": 10, "width": 1})
    C = build_classifier(config, K).eval()
    checkpoint.save_classifier(tmp_path / "c.safetensors", C, "digits", acgan.class_names, {})
    save_acgan(tmp_path / "acgan.safetensors", acgan)
    argv = ["eval", str(tmp_path / "c.safetensors"), "--attacks", "clean,gpgd-0.1", "--n", "20", "--device", "cpu"]
    assert cli.main(argv) == 2 and "acgan: gpgd and usong search" in capsys.readouterr().err
    argv += ["--acgan", str(tmp_path), "--json", str(tmp_path / "a.json"), "--uae-compat", "official-v1"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    assert "label head agrees %" in shown
    found = json.loads((tmp_path / "a.json").read_text())["attacks"]
    assert found["gpgd-0.1"]["compat"] == "official-v1" and found["gpgd-0.1"]["n"] == 20
    assert set(found["gpgd-0.1"]) >= {"wilson95", "generated_acc", "agreement", "agreement_adv", "draws"}
    assert "generated_acc" not in found["clean"]
