"""AutoAttack (Croce & Hein 2020): its attacks, on any classifier that maps images in [0,1] to logits."""

from puat_fast.attacks.autoattack.common import AttackWarning
from puat_fast.attacks.autoattack.ensemble import STANDARD, AutoAttackResult, autoattack
from puat_fast.attacks.autoattack.single import apgd_ce, apgd_t, fab_t, square

__all__ = [
    "STANDARD",
    "AttackWarning",
    "AutoAttackResult",
    "apgd_ce",
    "apgd_t",
    "autoattack",
    "fab_t",
    "square",
]
