"""All public attacks, one table: what they refuse and how they say so, odd input they take, what they leave alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from puat_fast.attacks import apgd_ce, apgd_t, autoattack, fab_t, gpgd, pgd, square, usong

EPS, SIDE, N = 0.1, 6, 6


class Identity(nn.Module):
    """A generator: z N x 36 is the image, N x 1 x 6 x 6. So gpgd and usong stand in the same table as the rest."""

    z_dim = SIDE * SIDE

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """N x 1 x 6 x 6."""
        return z.view(-1, 1, SIDE, SIDE)


class Labels(nn.Module):
    """A discriminator of 11 classes and "fake"."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(SIDE * SIDE, 12)

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        """(nothing, N x 12)."""
        return None, self.linear(x.flatten(1)).log_softmax(1)


def latent(attack: Callable[..., Any], *discriminator: nn.Module) -> Callable[..., Tensor]:
    def run(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        nets = [Identity(), *(net.to(x.dtype) for net in discriminator)]
        found: Tensor = attack(model, *nets, y, z=x.flatten(1), num_steps=2, image_size=SIDE, **options).x_adv
        return found

    return run


def standard(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    return autoattack(model, x, y, iterations=3, num_queries=5, **options).x_adv


torch.manual_seed(0)
ON_IMAGES: dict[str, Callable[..., Tensor]] = {
    "pgd": lambda *a, **k: pgd(*a, step_size=0.1, num_steps=3, **k),
    "pgd-kl-restarts": lambda *a, **k: pgd(*a, step_size=0.1, num_steps=2, loss="kl", restarts=2, **k),
    "pgd-l2": lambda *a, **k: pgd(*a, step_size=0.5, num_steps=2, norm="l2", loss="cw", **k),
    "apgd_ce": lambda *a, **k: apgd_ce(*a, num_steps=3, **k),
    "apgd_t": lambda *a, **k: apgd_t(*a, num_steps=3, **k),
    "fab_t": lambda *a, **k: fab_t(*a, num_steps=3, **k),
    "square": lambda *a, **k: square(*a, num_queries=20, **k),
    "autoattack": standard,
}
IN_LATENT_SPACE = {"gpgd": latent(gpgd), "usong": latent(usong, Labels())}
ALL = ON_IMAGES | IN_LATENT_SPACE
on_images = pytest.mark.parametrize("attack", ON_IMAGES.values(), ids=ON_IMAGES)
all_attacks = pytest.mark.parametrize("attack", ALL.values(), ids=ALL)
pytestmark = pytest.mark.filterwarnings("ignore::puat_fast.attacks.AttackWarning")


class Net(nn.Module):
    """BatchNorm, dropout, in-place ReLU."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(num_classes)
            self.net = nn.Sequential(
                nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten()
            )
            self.head = nn.Linear(6 * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits N x K."""
        return 5 * self.head(self.net(x))


class Returns(nn.Module):
    """A model that returns something else than logits; differentiable."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        """what(x)."""
        return self.what(x)


def images(n: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(dtype)


def right_labels(net: nn.Module, x: Tensor) -> Tensor:
    """What the net says, so that all attacks have all images to attack."""
    modes = [(module, module.training) for module in net.modules()]
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    for module, training in modes:
        module.training = training
    return y


def balanced(num_classes: int, x: Tensor) -> Net:
    """A net to which no class is more likely than another on these images."""
    net = Net(num_classes).eval()
    with torch.no_grad():
        net.head.bias -= net(x).mean(0) / 5
    return net


# -- refused --------------------------------------------------------------------------------------------------------

X, Y = images(), torch.arange(N)


@on_images
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X * 255, r"x: values from .*, expected images in \[0,1\]"),
        (X - 0.5, "x: values from -0"),
        (X.masked_fill(X > 0.9, torch.nan), "x: values from nan"),
        (X / 0, "x: values from"),
        ((X * 255).byte(), "x: dtype torch.uint8, expected"),
        (X.half(), "x: dtype torch.float16, expected"),
        (X.long(), "x: dtype torch.int64, expected"),
        (X[:, 0], r"x: shape \(6, 6, 6\), expected N x C x H x W"),
        (X.numpy(), "x: ndarray, expected a tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_that_are_none(attack, x, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        attack(Net(), x, Y)


@all_attacks
@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y + 5, "y: label.* 10, accepted: 0 to 9"),
        (Y - 1, "y: label"),
        (Y.float(), "y: .*torch.float32"),
        (Y.bool(), "y: .*torch.bool"),
        (Y[:, None], r"y: .*shape \(6, 1\)"),
        (Y.tolist(), "y: list, expected a tensor"),
        (nn.functional.one_hot(Y, 10), r"y: .*shape \(6, 10\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_that_are_none(attack, y, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        attack(Net(), X, y)


@on_images
def test_fewer_labels_than_images(attack):
    with pytest.raises(ValueError, match=r"^y: shape \(5,\), expected \(6,\)"):
        attack(Net(), X, Y[:5])


@pytest.mark.parametrize("attack", IN_LATENT_SPACE.values(), ids=IN_LATENT_SPACE)
def test_fewer_labels_than_latents(attack):
    with pytest.raises(ValueError, match=r"^z: shape \(6, 36\), expected \(5, 36\)"):
        attack(Net(), X, Y[:5])


@all_attacks
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none(attack, eps):
    with pytest.raises(ValueError, match=f"^eps: {eps}, accepted: finite numbers >= 0"):
        attack(Net(), X, Y, eps=eps)


@all_attacks
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: (x.flatten(1)[:, :10], x), "model: returned tuple, expected a tensor of logits N x K"),
        (lambda x: {"logits": x}, "model: returned dict"),
        (lambda x: x.sum((1, 2, 3)), r"model: returned .* shape \(6,\) for 6 images, expected .* N x K"),
        (lambda x: x.flatten(1)[:, :1], r"model: returned .* shape \(6, 1\)"),
        (lambda x: x, r"model: returned .* shape \(6, 1, 6, 6\)"),
        (lambda x: x.flatten(1)[:1, :10], r"model: returned .* shape \(1, 10\) for 6 images"),
        (lambda x: x.flatten(1)[:, :10].long(), "model: returned torch.int64"),
        (lambda x: x.flatten(1)[:, :10] * torch.nan, "model: logits are NaN or infinite"),
        (lambda x: x.flatten(1)[:, :10] - torch.tensor([torch.inf] + [0.0] * 9), "model: logits are NaN or infinite"),
    ],
    ids=["tuple", "dict", "1-D", "K=1", "4-D", "rows", "int", "nan", "inf"],
)
def test_models_that_return_no_logits(attack, what, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        attack(Returns(what), X, Y)


@all_attacks
def test_nan_logits_of_one_image(attack):
    net = Net()
    net.register_forward_hook(lambda m, i, logits: logits.masked_fill(torch.arange(len(i[0]))[:, None] == 3, torch.nan))
    with pytest.raises(ValueError, match=r"^model: logits are NaN or infinite"):
        attack(net, X, Y)


@pytest.mark.parametrize("name", ["apgd_ce", "apgd-dlr", "aa", "", "Square"])
def test_a_misspelt_attack(name):
    with pytest.raises(ValueError, match=f"^attacks: '{name}' is not one of apgd-ce, apgd-t, fab-t, square"):
        autoattack(Net(), X, Y, attacks=[name])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x, "discriminator: returned Tensor, expected"),
        (lambda x: (None, None, x), "discriminator: returned tuple, expected"),
        (lambda x: (None, x.flatten(1)[:, :5]), r"discriminator: returned label head of shape \(6, 5\), expected"),
        (lambda x: (None, x), r"discriminator: returned label head of shape \(6, 1, 6, 6\)"),
    ],
)
def test_discriminators_without_a_label_head(what, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        usong(Net(), Identity(), Returns(what), Y, num_steps=1)


@pytest.mark.parametrize("what", [lambda z: z, lambda z: (z.view(-1, 1, 6, 6), z), lambda z: z.view(-1, 1, 6, 6)[:2]])
def test_generators_that_make_no_images(what):
    generator = Identity()
    generator.forward = lambda z, y: what(z)
    with pytest.raises(ValueError, match=r"^generator: returned (shape|tuple).*, expected 6 images N x 3 x H x W"):
        gpgd(Net(), generator, Y, num_steps=1)


# -- taken ----------------------------------------------------------------------------------------------------------


@on_images
@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_classes(attack, num_classes):
    x = images(12)
    net = balanced(num_classes, x)
    y = right_labels(net, x)
    x_adv = attack(net, x, y, eps=0.5)
    assert x_adv.shape == x.shape and 0 <= x_adv.min() and x_adv.max() <= 1
    assert (net(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("attack", IN_LATENT_SPACE.values(), ids=IN_LATENT_SPACE)
def test_two_classes_in_latent_space(attack):
    x = images(12)
    net = balanced(2, x)
    y = right_labels(net, x)
    options = {} if attack is IN_LATENT_SPACE["gpgd"] else {"label_weight": 0, "norm_weight": 0}
    assert (net.eval()(attack(net, x, y, eps=0.5, step_size=0.5, **options)).argmax(1) != y).any()


@on_images
def test_eps_0_gives_the_images_back(attack):
    net, x = Net(), images()
    x[0], x[1] = 0, 1
    for y in (Y, right_labels(net, x)):
        x_adv = attack(net, x, y, eps=0)
        assert torch.equal(x_adv, x) and x_adv.data_ptr() != x.data_ptr()


def test_gpgd_with_eps_0_gives_the_images_back():
    assert torch.equal(ALL["gpgd"](Net(), X, Y, eps=0), X)


@all_attacks
def test_one_image_and_none(attack):
    net = Net()
    assert attack(net, X[:1], Y[:1], eps=EPS).shape == (1, 1, SIDE, SIDE)
    assert attack(net, X[:0], Y[:0], eps=EPS).shape == (0, 1, SIDE, SIDE)


@all_attacks
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_other_integer_types(attack, dtype):
    net = Net()
    y = right_labels(net, X)
    assert torch.equal(attack(net, X, y.to(dtype), eps=EPS), attack(net, X, y, eps=EPS))


@on_images
def test_memory_layouts(attack):
    net, x = Net().double(), images(dtype=torch.float64).expand(-1, 2, -1, -1).contiguous()[:, :1]
    net.net[0] = nn.Conv2d(2, 6, 3).double()
    x = torch.cat([x, 1 - x], 1)
    y = right_labels(net, x)
    layouts = {
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": torch.cat([x, x], 3)[..., :SIDE],
        "every second": torch.stack([x, x], 1).flatten(0, 1)[::2],
    }
    expected = attack(net, x, y, eps=EPS)
    for name, other in layouts.items():
        assert not other.is_contiguous(), name
        torch.testing.assert_close(attack(net, other, y, eps=EPS), expected, rtol=0, atol=1e-9, msg=name)
    broadcast = X[:1].expand(N, -1, -1, -1)
    before = broadcast.clone()
    attack(Net(), broadcast, Y, eps=EPS)
    assert torch.equal(broadcast, before)


@all_attacks
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad_and_inference_mode(attack, context):
    net = Net()
    y = right_labels(net, X)
    expected = attack(net, X, y, eps=EPS)
    with context():
        assert torch.equal(attack(net, X.clone(), y.clone(), eps=EPS), expected)  # inference tensors, there
        grad_enabled = torch.is_grad_enabled()
    assert not grad_enabled and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# -- left alone -----------------------------------------------------------------------------------------------------


@all_attacks
def test_the_model_comes_back_as_it_was(attack):
    net = Net().train()
    net.net[1].eval()
    net.net[0].bias.requires_grad_(False)
    net.head.weight.grad = torch.ones_like(net.head.weight)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    y = right_labels(net, X)
    once, twice = (attack(net, X, y, eps=EPS) for _ in range(2))
    assert torch.equal(once, twice)  # no dropout
    assert [module.training for module in net.modules()] == modes and set(modes) == {True, False}
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == {"net.0.bias"}
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.weight"]


@all_attacks
def test_it_comes_back_from_an_error_too(attack):
    net = Net().train()
    net.net[1].eval()
    passes = []

    def fail(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        passes.append(1)
        if len(passes) > 1:
            raise RuntimeError("out of memory")

    net.register_forward_pre_hook(fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(net, X, Y, eps=EPS)
    assert net.training and not net.net[1].training and net.head.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


def states() -> tuple[object, ...]:
    """Of the global generators, to be compared."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()  # noqa: NPY002


@all_attacks
def test_no_global_generator_moves(attack):
    net = Net()
    y = right_labels(net, X)
    torch.manual_seed(5)
    before = states()
    first = attack(net, X, y, eps=EPS)
    assert states() == before
    torch.manual_seed(6)
    assert torch.equal(attack(net, X, y, eps=EPS), first)


@all_attacks
@pytest.mark.parametrize("requires_grad", [False, True])
def test_images_and_labels_are_not_written_to(attack, requires_grad):
    net = Net()
    x, y = X.clone().requires_grad_(requires_grad), right_labels(net, X)
    before = y.clone()
    x_adv = attack(net, x, y, eps=EPS)
    assert torch.equal(x.detach(), X) and torch.equal(y, before)
    assert x.requires_grad is requires_grad and x.grad is None and x.grad_fn is None
    assert not x_adv.requires_grad
    x_adv.zero_()
    assert torch.equal(x.detach(), X)
