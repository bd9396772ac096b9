"""AutoAttack (Croce & Hein 2020): its attacks, on any classifier that maps images in [0,1] to logits."""

from puat_fast.attacks.autoattack.common import AttackWarning
from puat_fast.attacks.autoattack.single import apgd_ce, apgd_t, square

__all__ = ["AttackWarning", "apgd_ce", "apgd_t", "square"]
