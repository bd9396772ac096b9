"""Names of attacks, as `--attacks` takes them. Imports no torch, so that a typo is told at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from puat_fast.config import SearchPrecision

ACCEPTED = (
    "clean, pgd-E (L-inf ball of E/255, 0 < E <= 255, e.g. pgd-8), aa (AutoAttack, standard, L-inf 8/255), "
    "aa-Nit (the same with N iterations in place of 100: torchattacks' has 10, and is weaker), "
    "gpgd-E (ball of E in the latent space of an AC-GAN, 0 < E <= 10, e.g. gpgd-0.1), usong"
)
PRECISIONS: tuple[SearchPrecision, ...] = get_args(SearchPrecision)
_NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
_EXAMPLES = ("clean", "pgd-2", "pgd-4", "pgd-8", "aa", "aa-10it", "gpgd-0.1", "gpgd-0.01", "usong")


@dataclass(frozen=True, kw_only=True)
class AttackSpec:
    """What a name stands for. eps and step_size in units of the image range [0, 1], or of the latent z.

    step_size None: it adapts.
    """

    name: str
    kind: Literal["clean", "pgd", "aa", "gpgd", "usong"]
    eps: float = 0.0
    step_size: float | None = 0.0
    num_steps: int = 0
    draws: int = 1  # latents for each label

    @property
    def latent(self) -> bool:
        """Whether it attacks what an AC-GAN makes, instead of the images."""
        return self.kind in ("gpgd", "usong")


def parse_attack(name: str) -> AttackSpec:
    """The attack that a name stands for, with the numbers of the paper's Table IX. Raises ValueError."""
    if name == "clean":
        return AttackSpec(name="clean", kind="clean")
    if name == "aa":
        return AttackSpec(name="aa", kind="aa", eps=8 / 255, step_size=None, num_steps=100)
    match = re.fullmatch(r"aa-(\d{1,5})it", name)
    if match and int(match[1]) >= 1:
        iterations = int(match[1])
        return AttackSpec(name=f"aa-{iterations}it", kind="aa", eps=8 / 255, step_size=None, num_steps=iterations)
    match = re.fullmatch(rf"pgd-({_NUMBER})", name)
    if match and 0 < float(match[1]) <= 255:
        radius = float(match[1])
        return AttackSpec(name=f"pgd-{_text(radius)}", kind="pgd", eps=radius / 255, step_size=1 / 255, num_steps=20)
    match = re.fullmatch(rf"gpgd-({_NUMBER})", name)
    if match and 0 < float(match[1]) <= 10:
        radius = float(match[1])
        return AttackSpec(name=f"gpgd-{_text(radius)}", kind="gpgd", eps=radius, step_size=0.1, num_steps=20)
    if name == "usong":  # the official script takes ten latents for each test label
        return AttackSpec(name="usong", kind="usong", eps=0.01, step_size=0.1, num_steps=200, draws=10)
    close = difflib.get_close_matches(name, _EXAMPLES, n=1)
    raise ValueError(f"attacks: {name!r} is not one of {ACCEPTED}" + (f"; did you mean {close[0]}?" if close else ""))


def _text(radius: float) -> str:
    """All digits, so that the name stands for the same radius when it is read again."""
    return repr(radius).removesuffix(".0")


def parse_attacks(text: str) -> list[AttackSpec]:
    """The attacks of a comma-separated list, each once, in the order given. Raises ValueError."""
    specs = {spec.name: spec for spec in (parse_attack(name.strip()) for name in text.split(","))}
    return list(specs.values())


def parse_precision(text: str, specs: Sequence[AttackSpec]) -> dict[str, SearchPrecision]:
    """The precision of each attack's search: `bf16`, or `fp32,aa=bf16,pgd-8=bf16`, where the last that fits wins.

    `clean` searches nothing, and so is always fp32. Raises ValueError for an unknown precision, and for an attack that
    is none of specs.
    """
    found: dict[str, SearchPrecision] = {spec.name: "fp32" for spec in specs}
    for part in text.split(","):
        attack, equals, name = part.strip().rpartition("=")
        chosen = next((precision for precision in PRECISIONS if precision == name.strip()), None)
        if chosen is None:
            raise ValueError(f"precision: {part.strip()!r} is not {', '.join(PRECISIONS)}, nor ATTACK= one of these")
        names = [parse_attack(attack.strip()).name] if equals else list(found)
        if not set(names) <= set(found):
            raise ValueError(f"precision: {part.strip()!r}: {names[0]} is not one of --attacks {','.join(found)}")
        found |= dict.fromkeys(names, chosen)
    return found | {spec.name: "fp32" for spec in specs if spec.kind == "clean"}
