"""docs/latent_starts.py, which makes README's table and picture of GPGD and USong, on tiny networks."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from puat_fast import checkpoint
from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator
from puat_fast.attacks.acgan_file import AcGan, save_acgan
from puat_fast.networks.classifier import Classifier

SCRIPT = Path(__file__).parents[2] / "docs" / "latent_starts.py"


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gan = AcGan(AcGenerator(10, 6, width=2), AcDiscriminator(10, width=2), "digits", tuple("0123456789"))
        C = Classifier(10, depth=10, width=1)
    save_acgan(tmp_path / "gan.safetensors", gan)
    checkpoint.save_classifier(tmp_path / "c.safetensors", C, "digits", gan.class_names, {})
    arguments = [tmp_path / "gan.safetensors", tmp_path / "c.safetensors", "-n", 5, "--attacks", "gpgd-0.1"]
    monkeypatch.setattr(sys, "argv", ["latent_starts.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    _, _, ball, image = (line.split(" | ") for line in capsys.readouterr().out.splitlines())
    assert ball[1:3] == ["gpgd-0.1", "ball"] and image[1:3] == ["gpgd-0.1", "image"]
    assert ball[3] == image[3] and all("%" in cell for cell in ball[3:] + image[3:])


def test_the_picture_shows_each_class_once_a_row(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gan = AcGan(AcGenerator(3, 6, width=1).eval(), AcDiscriminator(3, width=1).eval(), "digits", ("a", "b", "c"))
        C = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    script["picture"](C, gan, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 3 * 96 and picture.height > 4 * 96


@pytest.mark.parametrize("start", ["ball", "image"])
def test_measured_at_the_start_and_after(start):
    """Counts by hand, of a discriminator that always says 1 and a classifier that always says 2."""
    script = runpy.run_path(str(SCRIPT))
    gan = AcGan(AcGenerator(3, 6, width=1).eval(), AcDiscriminator(3, width=1).eval(), "digits", ("a", "b", "c"))
    gan.D.forward = lambda x: (None, torch.eye(4)[[1] * len(x)])
    C = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    C[1].weight.data.zero_()
    C[1].bias.data.copy_(torch.tensor([0.0, 0.0, 9.0]))
    spec = script["parse_attack"]("gpgd-0.1")
    cells = script["measure"](C, gan, torch.tensor([0, 1, 1, 1, 2]), spec, start)
    assert cells == ("20 / 60 %",) * 3
