"""Attacks on any classifier that maps images in [0,1] to logits."""

from puat_fast.attacks.pgd import pgd

__all__ = ["pgd"]
