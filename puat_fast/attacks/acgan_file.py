"""A trained AC-GAN in one file: weights of G and D, and what they are of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from puat_fast import files
from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator

ACGAN_FILE = "acgan.safetensors"
FORMAT = "puat-fast-acgan-1"


@dataclass(frozen=True)
class AcGan:
    """The generator and the discriminator that GPGD and USong need, in eval mode, and the dataset they imitate."""

    G: AcGenerator
    D: AcDiscriminator
    dataset: str
    class_names: tuple[str, ...]


def save_acgan(path: Path, acgan: AcGan) -> None:
    """Write it, whole or not at all. Raises OSError."""
    G, D = acgan.G, acgan.D
    about = {
        "dataset": acgan.dataset, "class_names": list(acgan.class_names),
        "z_dim": G.z_dim, "width_G": G.width, "width_D": D.width,
    }  # fmt: skip
    tensors = {f"{name}.{key}": t.float() if t.is_floating_point() else t
               for name, net in (("G", G), ("D", D)) for key, t in net.state_dict().items()}  # fmt: skip
    with files.atomic_write(path) as beside:
        packed = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(packed, beside, {FORMAT: json.dumps(about)})


def load_acgan(path: str | Path, device: torch.device | str = "cpu") -> AcGan:
    """The AC-GAN of a run directory of `train --method acgan`, or of its file. Raises ValueError, FileNotFoundError."""
    path = Path(path).expanduser()
    file = path / ACGAN_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such AC-GAN; `puat-fast train --method acgan` makes one")
    try:
        with safetensors.safe_open(file, "pt") as handle:
            about = json.loads((handle.metadata() or {})[FORMAT])
        names = tuple(map(str, about["class_names"]))
        G = AcGenerator(len(names), int(about["z_dim"]), int(about["width_G"]))
        D = AcDiscriminator(len(names), int(about["width_D"]))
        tensors = safetensors.torch.load_file(file)
        for name, net in (("G", G), ("D", D)):
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            net.load_state_dict(own)
    except (KeyError, TypeError, ValueError, RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: broken, or not an AC-GAN of puat-fast: {str(error).splitlines()[0]}") from error
    for net in (G, D):
        net.to(device).eval().requires_grad_(False)
    return AcGan(G, D, str(about["dataset"]), names)
