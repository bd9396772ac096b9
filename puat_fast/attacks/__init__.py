"""Attacks on any classifier that maps images in [0,1] to logits."""

from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator
from puat_fast.attacks.autoattack import (
    AttackWarning,
    AutoAttackResult,
    apgd_ce,
    apgd_t,
    autoattack,
    fab_t,
    square,
)
from puat_fast.attacks.gpgd import LatentExamples, gpgd
from puat_fast.attacks.pgd import pgd
from puat_fast.attacks.usong import usong

__all__ = [
    "AcDiscriminator",
    "AcGenerator",
    "AttackWarning",
    "AutoAttackResult",
    "LatentExamples",
    "apgd_ce",
    "apgd_t",
    "autoattack",
    "fab_t",
    "gpgd",
    "pgd",
    "square",
    "usong",
]
