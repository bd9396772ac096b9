"""AutoAttack that was stopped goes on to the bit; what is searched in bfloat16 is judged in float32."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from small_nets import heldout, trained
from torch import Tensor, nn

from puat_fast.attacks.autoattack import AttackWarning, autoattack
from puat_fast.attacks.precision import searching
from puat_fast.networks.classifier import Classifier

SHORT: dict[str, Any] = {"iterations": 10, "num_queries": 60, "num_targets": 3, "batch_size": 8}


class Killed(Exception):
    pass


def killed_and_restarted(after: int, **options: Any):
    """The result of a run that is killed at each `after`-th save and started again from the last one, and how often."""
    net, (x, y) = trained("bn"), heldout(24)
    saved, deaths = None, 0
    while True:
        states: list[dict[str, Any]] = []

        def save(state: dict[str, Any], states: list[dict[str, Any]] = states) -> None:
            states.append(state)
            if len(states) == after:
                raise Killed

        try:
            return autoattack(net, x, y, 0.12, save=save, save_every=0, saved=saved, **SHORT, **options), deaths
        except Killed:
            deaths += 1
            saved = states[-1]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_killed_again_and_again_it_ends_the_same_to_the_bit(norm):
    net, (x, y) = trained("bn"), heldout(24)
    whole = autoattack(net, x, y, 0.12, norm=norm, **SHORT)
    parts, deaths = killed_and_restarted(3, norm=norm)
    assert deaths > 10
    assert torch.equal(parts.x_adv, whole.x_adv) and torch.equal(parts.y_adv, whole.y_adv)
    assert parts.broken_by == whole.broken_by and parts.accuracy == whole.accuracy
    assert parts.warnings == whole.warnings and list(parts.seconds) == list(whole.seconds)


def test_faithful_goes_on_from_attack_to_attack():
    net, (x, y) = trained("bn"), heldout(24)
    whole = autoattack(net, x, y, 0.12, faithful=True, **SHORT)
    parts, deaths = killed_and_restarted(1, faithful=True)
    assert deaths == 4 and torch.equal(parts.x_adv, whole.x_adv)


def test_a_state_can_be_written_and_read_safely(tmp_path):
    net, (x, y) = trained("bn"), heldout(8)
    states: list[dict[str, Any]] = []
    whole = autoattack(net, x, y, 0.12, save=states.append, save_every=0, **SHORT)
    torch.save(states[2], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(autoattack(net, x, y, 0.12, saved=saved, **SHORT).x_adv, whole.x_adv)


def test_a_state_stays_as_it_is_and_serves_twice():
    net, (x, y) = trained("bn"), heldout(24)
    kept: list[dict[str, Any]] = []  # as they are: nothing was written to a file and read again
    whole = autoattack(net, x, y, 0.12, save=kept.append, save_every=0, **SHORT)
    assert len(kept) > 20
    for saved in (kept[2], kept[2], *kept[3::12]):
        found = autoattack(net, x, y, 0.12, saved=saved, **SHORT)
        assert torch.equal(found.x_adv, whole.x_adv) and found.broken_by == whole.broken_by


def test_lanes_that_begin_fooled_go_on_as_they_would():
    net, (x, y) = trained("bn"), heldout(24)
    large: dict[str, Any] = SHORT | {"eps": 0.5, "attacks": ["square"]}  # stripes that fool before any query
    kept: list[dict[str, Any]] = []
    whole = autoattack(net, x, y, save=kept.append, save_every=0, **large)
    assert kept[0]["unfinished"]["lanes"]["lanes"]["fooled"].any()
    for saved in kept:
        assert torch.equal(autoattack(net, x, y, saved=saved, **large).x_adv, whole.x_adv)


@pytest.mark.parametrize("other", [{"eps": 0.1}, {"seed": 1}, {"attacks": ("apgd-ce",)}, {"x": "darker"}])
def test_a_state_of_another_call_is_refused(other):
    net, (x, y) = trained("bn"), heldout(8)
    states: list[dict[str, Any]] = []
    autoattack(net, x, y, 0.12, save=states.append, save_every=0, **SHORT)
    if other.pop("x", None):
        x = x / 2
    with pytest.raises(ValueError, match="saved: the state of another call"):
        autoattack(net, x, y, **({"eps": 0.12} | SHORT | other), saved=states[0])


def test_what_bf16_finds_is_judged_in_fp32():
    net, (x, y) = trained("bn"), heldout(48)
    found = autoattack(net, x, y, 0.12, precision="bf16", **SHORT)
    exact = autoattack(net, x, y, 0.12, **SHORT)
    with torch.no_grad():
        assert torch.equal(net(found.x_adv).argmax(1) == y, found.robust)
    assert abs(found.robust_acc - exact.robust_acc) <= 2 / 48 and found.robust_acc < found.accuracy["clean"]
    assert not found.standard and not torch.equal(found.x_adv, exact.x_adv)


class WrongInBf16(nn.Module):
    """Right in float32, in half precision always wrong: a search there claims what is not so."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.linear = net, nn.Linear(1, 1)
        self.exact = 0

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        low = self.linear(x[:, 0, 0, :1]).dtype == torch.bfloat16
        self.exact += 0 if low else len(x)
        return -logits.float() if low else logits


def test_a_false_claim_of_bf16_is_attacked_again_in_fp32():
    net, (x, y) = WrongInBf16(trained("bn")).eval(), heldout(24)
    with warnings.catch_warnings(action="ignore", category=AttackWarning):
        found = autoattack(net, x, y, 0.12, precision="bf16", **SHORT)
    exact = autoattack(net.net, x, y, 0.12, **SHORT)
    assert found.accuracy == exact.accuracy and found.broken_by == exact.broken_by and net.exact > 1000


def test_our_classifier_convolves_in_bf16_and_comes_back():
    C = Classifier(10, 10, 1).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = C(x)
    with searching(C, "bf16", x.device):
        assert C.conv_dtype == torch.bfloat16
        rounded = C(x)
    assert C.conv_dtype is None and torch.equal(C(x), exact)
    assert rounded.dtype == torch.float32 and 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_fp32_is_fp32_whatever_was_set_before():
    C, x = Classifier(10, 10, 1).eval(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = C(x)
    C.conv_dtype = torch.bfloat16  # as a run in bf16 leaves it
    with torch.autocast("cpu", torch.bfloat16), searching(C, "fp32", x.device):
        assert torch.equal(C(x), exact)
    assert C.conv_dtype == torch.bfloat16
    net, (images, labels) = trained("bn"), heldout(24)
    whole = autoattack(net, images, labels, 0.12, **SHORT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(autoattack(net, images, labels, 0.12, **SHORT).x_adv, whole.x_adv)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "precision: 'fp8' is not one of fp32, tf32, bf16"),
        ({"precision": "tf32"}, "precision: tf32 is of GPUs"),
        ({"precision": "bf16", "faithful": True}, "precision: 'bf16', but faithful"),
    ],
)
def test_precisions_that_cannot_be(options, words):
    net, (x, y) = trained("bn"), heldout(2)
    with pytest.raises(ValueError, match=words):
        autoattack(net, x, y, 0.1, **options)


class GivesIn(nn.Module):
    """Right about everything until it has been asked so often, then wrong about the darker half of the images."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.asked = after, 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        margin = 1 + 0.01 * x.flatten(1).mean(1)
        if self.asked > self.after:
            margin = margin * (x[:, 0, 0, 0] - 0.5).sign()
        return torch.stack([margin, torch.zeros_like(margin)], dim=1)


@pytest.mark.parametrize(("after", "late"), [(50, False), (90, True)])
def test_steps_that_have_not_converged_are_told(after, late):
    x = torch.full((20, 3, 8, 8), 0.2)
    x[:10] = 0.8
    with warnings.catch_warnings(action="ignore", category=AttackWarning):
        found = autoattack(GivesIn(after), x, torch.zeros(20, dtype=torch.int64), 0.1, attacks=["apgd-ce"])
    assert found.robust_acc == 0.5
    told = [text for text in found.warnings if "not converged" in text]
    assert len(told) == late and all("apgd-ce: 10 of 20 images (50.0%) were fooled only in the last" in t for t in told)


class GivesInInBf16(GivesIn):
    """In float32 it never gives in."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.stack([1 + 0.01 * x.flatten(1).mean(1), torch.zeros(len(x))], dim=1)


def test_what_is_not_fooled_after_all_was_not_fooled_late():
    x, y = torch.full((20, 3, 8, 8), 0.2), torch.zeros(20, dtype=torch.int64)
    net = GivesInInBf16(90)
    with warnings.catch_warnings(action="ignore", category=AttackWarning):
        found = autoattack(net, x, y, 0.1, attacks=["apgd-ce"], precision="bf16")
    assert net.asked > 90 and found.robust_acc == 1
    assert not any("not converged" in text for text in found.warnings)
