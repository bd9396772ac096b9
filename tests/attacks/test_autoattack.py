"""The ensemble: the reference's results, the optimum where it is known, masked gradients, honesty, mistakes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from reference_attacks import accuracy, distance
from small_nets import EPS, heldout, trained
from torch import Tensor, nn

from puat_fast.attacks.autoattack import STANDARD, AttackWarning, apgd_ce, apgd_t, autoattack, fab_t, square

RADII = {"linf": EPS, "l2": 0.5}
SHORT = {"iterations": 10, "num_queries": 50}
SINGLE = {"apgd-ce": apgd_ce, "apgd-t": apgd_t, "fab-t": fab_t, "square": square}


def reference_suite(net: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, batch_size: int = 250, **options: int):
    """x_adv and accuracies of pyautoattack's standard version; options: attributes of all its attacks."""
    library = pytest.importorskip("pyautoattack.autoattack", reason="pyautoattack (extra `test`) is not installed")
    suite = library.AutoAttack(net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=0)
    for attack in (suite.apgd, suite.apgd_targeted, suite.fab, suite.square):
        for name, value in options.items():
            setattr(attack, name, value)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=batch_size)
    return x_adv


# -- as strong as the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_faithful_is_the_reference_batch_by_batch(norm):
    net, (x, y) = trained("bn"), heldout(16)
    few = {"n_queries": 200, "n_target_classes": 2}
    theirs = reference_suite(net, x, y, RADII[norm], norm, batch_size=10, **few)
    attack = {"num_queries": 200, "num_targets": 2, "faithful": True}
    ours = autoattack(net, x, y, RADII[norm], norm=norm, batch_size=10, **attack)
    by_fab = torch.tensor([name == "fab-t" for name in ours.broken_by])
    assert torch.equal(ours.x_adv[~by_fab], theirs[~by_fab])
    assert ours.robust_acc == accuracy(net, theirs, y) and not ours.standard


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "bn"])
def test_fast_agrees_to_half_a_point_on_500_images(kind):
    net, (x, y) = trained(kind), heldout(500)
    eps = {"relu": 0.2, "bn": 0.15}[kind]
    theirs = reference_suite(net, x, y, eps, "linf", n_queries=500)
    ours = autoattack(net, x, y, eps, num_queries=500)
    assert 0.1 < ours.robust_acc < 0.5 < ours.accuracy["clean"]
    assert abs(ours.robust_acc - accuracy(net, theirs, y)) <= 0.005


def test_result_says_image_by_image_what_broke_it():
    net, (x, y) = trained("bn"), heldout(60)
    seen: list[tuple[str, int, int, float]] = []
    result = autoattack(net, x, y, EPS, **SHORT, progress=lambda *told: seen.append(told))
    wrong = net(result.x_adv).argmax(1)
    assert torch.equal(wrong, result.y_adv) and torch.equal(wrong == y, result.robust)
    assert list(result.accuracy) == ["clean", *STANDARD] and list(result.seconds) == list(STANDARD)
    left = len(x)
    for name, found in result.accuracy.items():
        left -= result.broken_by.count(name)
        assert found == pytest.approx(left / len(x))
    assert result.robust_acc == pytest.approx(result.accuracy["square"])
    clean = torch.tensor([name == "clean" for name in result.broken_by])
    assert torch.equal(net(x).argmax(1) != y, clean)
    assert torch.equal(result.x_adv[clean | result.robust], x[clean | result.robust])
    assert distance(result.x_adv, x, "linf").max() <= EPS * (1 + 1e-6)
    assert [name for name in dict.fromkeys(name for name, *_ in seen)] == list(STANDARD)
    assert all(0 <= done <= total for _, done, total, _ in seen) and seen[-1][3] == pytest.approx(result.robust_acc)


def test_standard_means_all_of_it():
    net, (x, y) = trained("relu"), heldout(2)
    assert not autoattack(net, x, y, EPS, iterations=10).standard
    assert not autoattack(net, x, y, EPS, attacks=STANDARD[:3]).standard
    assert not autoattack(net, x, y, EPS, num_targets=3, **SHORT).standard
    assert autoattack(net, x, y, 0, restarts=2, seed=4, norm="l2").standard


# -- linear models: the optimum is known ------------------------------------------------------------------------------


class Linear(nn.Module):
    """K logits, linear in the image."""

    def __init__(self, num_classes: int = 10, size: int = 3 * 6 * 6) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, size, generator=g))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def distance_to_boundary(net: Linear, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """To the closest image of another class, where the range [0,1] does not cut in."""
    z, w = net(x), net.weight
    gap = z.gather(1, y[:, None]) - z
    slope = w[y][:, None] - w[None]
    size = slope.abs().sum(2) if norm == "linf" else slope.norm(dim=2)
    return (gap / size).masked_fill(gap == 0, torch.inf).amin(1).detach()


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.filterwarnings("ignore::puat_fast.attacks.autoattack.AttackWarning")
def test_a_linear_model_is_attacked_to_its_optimum(name, norm, num_classes):
    net = Linear(num_classes)
    x = 0.45 + 0.1 * torch.rand(24, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    y = net(x).argmax(1)
    true = distance_to_boundary(net, x, y, norm)
    eps = true.median().item()
    slack = 1.05 if name == "square" else 1.02
    if (name, norm) == ("square", "l2"):  # its changes are bumps, which these random weights average out
        eps, slack = 3 * eps, 3.0
    x_adv = SINGLE[name](net, x, y, eps=eps, norm=norm, **({"num_queries": 3000} if name == "square" else {}))
    fooled = net(x_adv).argmax(1) != y
    assert not fooled[true > eps * 1.001].any()
    if name == "apgd-ce" and num_classes > 2:  # the cross-entropy may lead to another class than the nearest
        assert fooled[true * 1.5 < eps].all()
    else:
        assert fooled[true * slack < eps].all()
    assert fooled.sum() >= 6


# -- honesty ----------------------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """A net that sees its images in a few grey levels only: no gradient gets through."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 8).round() / 8)


@pytest.mark.parametrize("differentiable", [True, False])
def test_masked_gradients_are_found_by_square_and_told(differentiable):
    net, (x, y) = Quantised(trained("bn")), heldout(40)
    if not differentiable:
        net.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
    with pytest.warns(AttackWarning) as told:
        result = autoattack(net, x, y, EPS, iterations=10, num_queries=500)
    texts = [str(w.message) for w in told]
    assert tuple(texts) == result.warnings
    assert any("zero gradient at" in text and "apgd-ce" in text for text in texts)
    assert any("square took" in text and "masked" in text for text in texts)
    assert result.accuracy["square"] < result.accuracy["fab-t"] - 0.05


def test_no_warning_without_a_reason():
    net, (x, y) = trained("relu"), heldout(30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert autoattack(net, x, y, EPS, iterations=50, num_queries=20).warnings == ()


def test_probabilities_and_a_randomised_model_are_told():
    x, y = heldout(20)
    with pytest.warns(AttackWarning, match="look like probabilities"):
        apgd_ce(nn.Sequential(trained("relu"), nn.Softmax(1)), x, y, num_steps=1)
    noisy = nn.Sequential(trained("relu"))
    noisy.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.1 * torch.randn_like(inputs[0]),))
    state = torch.get_rng_state()
    with pytest.warns(AttackWarning, match="randomised"):
        apgd_ce(noisy, x, y, num_steps=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("faithful", [True, False])
@pytest.mark.parametrize("name", STANDARD)
def test_model_and_global_generator_come_back_as_they_were(name, faithful):
    net = copy.deepcopy(trained("bn")).train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [p.requires_grad for p in net.parameters()]
    x, y = heldout(12)
    state = torch.get_rng_state()
    steps = {"num_queries": 10} if name == "square" else {"num_steps": 3}
    x_adv = SINGLE[name](net, x, y, eps=EPS, faithful=faithful, **steps)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and not net[1].training and net[4].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())
    assert not x_adv.requires_grad and x_adv.data_ptr() != x.data_ptr()
    again = SINGLE[name](net, x, y, eps=EPS, faithful=faithful, **steps)
    assert torch.equal(again, x_adv)


def test_everything_comes_back_after_an_error():
    net = copy.deepcopy(trained("bn")).train()
    calls = []

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("out of memory")

    net.register_forward_pre_hook(fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        autoattack(net, *heldout(5), EPS)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_within_inference_mode_in_float64_and_non_contiguous():
    net, (x, y) = copy.deepcopy(trained("relu")).double(), heldout(8)
    with torch.inference_mode():
        turned = x.double().transpose(2, 3).contiguous().transpose(2, 3)
        inside = autoattack(net, turned, y.int(), EPS, **SHORT)
    outside = autoattack(net, x.double(), y, EPS, **SHORT)
    assert torch.equal(inside.x_adv, outside.x_adv) and inside.x_adv.dtype == torch.float64


def test_padding_changes_nothing_but_the_sizes_of_batches():
    net, (x, y) = copy.deepcopy(trained("bn")), heldout(40)
    sizes: set[int] = set()
    net.register_forward_pre_hook(lambda module, inputs: sizes.add(len(inputs[0])))
    plain = autoattack(net, x, y, EPS, batch_size=16, **SHORT)
    many = set(sizes)
    sizes.clear()
    net._orig_mod = None  # as torch.compile marks what it made
    padded = autoattack(net, x, y, EPS, batch_size=16, **SHORT)
    assert sizes <= {2, 4, 8, 16} and len(many) > 4
    assert abs(plain.robust_acc - padded.robust_acc) <= 1 / 40 + 1e-9


# -- few classes, few images, nothing to do ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_dlr_loss_needs_four_classes(num_classes):
    net = Linear(num_classes)
    x = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with pytest.warns(AttackWarning, match=rf"needs 4 classes, of {num_classes}"):
        result = autoattack(net, x, net(x).argmax(1), 0.5, **SHORT)
    assert result.robust_acc < 1


@pytest.mark.parametrize("faithful", [True, False])
def test_eps_0_one_image_no_image_and_all_wrong(faithful):
    net, (x, y) = trained("relu"), heldout(3)
    attack = SHORT | {"faithful": faithful}
    unmoved = autoattack(net, x, y, 0, **attack)
    assert torch.equal(unmoved.x_adv, x) and list(unmoved.accuracy) == ["clean"]
    assert unmoved.robust_acc == accuracy(net, x, y)
    assert all(torch.equal(attack(net, x, y, eps=0), x) for attack in SINGLE.values())
    one = autoattack(net, x[:1], y[:1], EPS, **attack)
    assert one.x_adv.shape == x[:1].shape and len(one.broken_by) == 1
    assert autoattack(net, x[:0], y[:0], **attack).broken_by == ()
    wrong = autoattack(net, x, (net(x).argmax(1) + 1) % 10, EPS, **attack)
    assert wrong.broken_by == ("clean",) * 3 and wrong.robust_acc == 0 and torch.equal(wrong.x_adv, x)


# -- mistakes ---------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A model that returns something else than logits."""

    def __init__(self, what) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor):
        return self.what(x)


X, Y = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 9])


@pytest.mark.parametrize("name", ["ensemble", "apgd-ce", "square"])
@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"x": X * 255}, r"x: values from .* to 25\d\S*, expected images in \[0,1\]"),
        ({"x": X - 0.5}, r"x: values from -0"),
        ({"x": X.masked_fill(X > 0.9, torch.nan)}, r"x: values from nan"),
        ({"x": (X * 255).byte()}, "x: dtype torch.uint8, expected .* float32 or float64"),
        ({"x": X.half()}, "x: dtype torch.float16"),
        ({"x": X.numpy()}, "x: ndarray, expected a tensor"),
        ({"x": X[0]}, r"x: shape \(3, 6, 6\), expected N x C x H x W"),
        ({"y": Y[:3]}, r"y: shape \(3,\), expected \(4,\)"),
        ({"y": Y[:, None]}, r"y: shape \(4, 1\)"),
        ({"y": Y.float()}, "y: dtype torch.float32"),
        ({"y": Y - 1}, "y: label -1, accepted: 0 to"),
        ({"y": Y + 1}, "y: label 10, accepted: 0 to 9"),
        ({"eps": -0.1}, r"eps: -0.1, accepted: finite numbers >= 0"),
        ({"eps": float("nan")}, "eps: nan"),
        ({"norm": "l1"}, "norm: 'l1' is not one of linf, l2"),
        ({"restarts": 0}, "restarts: 0, accepted: integers >= 1"),
        ({"batch_size": 2.5}, "batch_size: 2.5"),
        ({"seed": -1}, "seed: -1"),
        ({"model": Returns(lambda x: (x.flatten(1), x))}, "model: returned tuple, expected a tensor of logits N x K"),
        ({"model": Returns(lambda x: x)}, "model: returned torch.float32 of shape"),
        ({"model": Returns(lambda x: x.flatten(1)[:, :1])}, r"model: returned .*\(4, 1\)"),
        ({"model": Returns(lambda x: x.flatten(1)[:3, :10])}, r"model: returned .*\(3, 10\) for 4 images"),
        ({"model": Returns(lambda x: x.flatten(1)[:, :10] / 0)}, "model: logits are NaN or infinite"),
    ],
)
def test_mistakes_are_told_by_name(name, arguments, text):
    values = {"model": Linear(), "x": X, "y": Y} | arguments
    with pytest.raises(ValueError, match=f"^{text}"):
        (autoattack if name == "ensemble" else SINGLE[name])(**values)


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"attacks": ["apgd-ce", "fabt"]}, "attacks: 'fabt' is not one of .*; did you mean fab-t"),
        ({"attacks": ["APGD"]}, "attacks: 'APGD' is not one of apgd-ce, apgd-t, fab-t, square"),
        ({"attacks": []}, "attacks: none given"),
        ({"attacks": ["square", "square"]}, "attacks: square, square; accepted: .* each once"),
        ({"iterations": 0}, "iterations: 0, accepted: integers >= 1"),
        ({"num_queries": 0}, "num_queries: 0"),
        ({"num_targets": -1}, "num_targets: -1"),
    ],
)
def test_mistakes_of_the_ensemble(arguments, text):
    with pytest.raises(ValueError, match=f"^{text}"):
        autoattack(Linear(), X, Y, **arguments)


@pytest.mark.parametrize("name", STANDARD)
def test_nan_under_attack_is_told(name):
    # finite at the images themselves only
    def logits(x: Tensor) -> Tensor:
        away = torch.cdist(x.flatten(1), X.flatten(1)).amin(1, keepdim=True)
        return x.flatten(1)[:, :10].masked_fill(away > 1e-3, torch.nan)

    y = X.flatten(1)[:, :10].argmax(1)
    with pytest.raises(ValueError, match="model: logits are NaN or infinite"):
        SINGLE[name](Returns(logits), X, y, eps=EPS)
