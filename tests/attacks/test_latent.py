"""GPGD and USong: known optima, the published order of operations, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puat_fast import objectives
from puat_fast.attacks import LatentExamples, gpgd, usong
from puat_fast.attacks.acgan import AcDiscriminator, AcGenerator, shrink
from puat_fast.networks import Generator
from puat_fast.noise import Noise
from puat_fast.testing import RecordedNoise

N, Z_DIM, K = 5, 6, 3
Y = torch.tensor([0, 1, 2, 0, 1])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class LinearGenerator(nn.Module):
    """Gen(z, y) = z M + shift_y, as images N x 3 x 2 x 2 (not in [0,1]: nobody minds)."""

    num_classes, z_dim = K, Z_DIM

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = nn.Parameter(drawn(Z_DIM, 12, seed=1).to(dtype))
        self.shift = nn.Parameter(drawn(K, 12, seed=2).to(dtype))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """N x 3 x 2 x 2."""
        return (z @ self.matrix + self.shift[y]).view(-1, 3, 2, 2)


class Linear(nn.Module):
    """Two classes, logits (0, <w, x>)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(drawn(12, seed=3).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits N x 2."""
        score = x.flatten(1) @ self.w / 10
        return torch.stack([torch.zeros_like(score), score], 1)


class LinearLabels(nn.Module):
    """A discriminator for LinearGenerator: log-probabilities of K + 1 classes, linear in x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, K + 1, dtype=torch.float64)
        self.linear.weight.data = drawn(K + 1, 12, seed=4)

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        """(nothing, N x (K + 1))."""
        return None, self.linear(x.flatten(1)).log_softmax(1)


class Modes(nn.Module):
    """BatchNorm and dropout on top of a linear layer; remembers the mode of each forward."""

    def __init__(self, features_in: int, features_out: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features_in, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU())
        self.head = nn.Linear(16, features_out)
        self.modes: list[bool] = []

    def run(self, h: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.head(self.net(h.flatten(1)))


class ModesGenerator(Modes):
    z_dim = Z_DIM

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.run(z).view(-1, 3, 2, 2).sigmoid()


class ModesClassifier(Modes):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class ModesLabels(Modes):
    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.run(x).log_softmax(1)


def modes_networks() -> tuple[ModesClassifier, ModesGenerator, ModesLabels]:
    torch.manual_seed(0)
    nets = ModesClassifier(12, K).double(), ModesGenerator(Z_DIM, 12).double(), ModesLabels(12, K + 1).double()
    return nets


def run_gpgd(model: nn.Module, generator: nn.Module, _: nn.Module, y: Tensor, **options: Any) -> LatentExamples:
    return gpgd(model, generator, y, **options)


Attack = Callable[..., LatentExamples]
both_attacks = pytest.mark.parametrize("attack", [run_gpgd, usong])


def replay(start: Tensor) -> RecordedNoise:
    return RecordedNoise({"latent_start": [start]}, dtype=torch.float64)


# -- GPGD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["none", "official-v1"])
@pytest.mark.parametrize("step_size", [0.02, 0.1, 0.3])
def test_gpgd_reaches_the_best_corner_of_a_linear_pair(compat, step_size):
    model, generator, y = Linear(), LinearGenerator(), Y % 2
    z = drawn(N, Z_DIM)
    found = gpgd(model, generator, y, z=z, step_size=step_size, compat=compat)
    direction = (generator.matrix @ model.w).detach().sign()
    best = 0.1 * torch.where(y == 0, 1.0, -1.0)[:, None].double() * direction
    torch.testing.assert_close(found.delta, best, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.x_adv, generator(z + best, y).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.x_nat, generator(z, y).detach(), rtol=0, atol=0)
    assert torch.equal(found.z, z) and torch.equal(found.z_adv, z + found.delta)
    assert F.cross_entropy(model(found.x_adv), y) > F.cross_entropy(model(found.x_nat), y)


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_gpgd_stays_in_the_ball(num_steps):
    found = gpgd(Linear(), LinearGenerator(), Y % 2, eps=0.25, step_size=1.0, num_steps=num_steps)
    assert 0 < found.delta.abs().max() <= 0.25


def test_eps_0_finds_the_natural_image():
    found = gpgd(Linear(), LinearGenerator(), Y % 2, eps=0, num_steps=2)
    assert torch.equal(found.x_adv, found.x_nat) and not found.delta.any()


@pytest.mark.parametrize(
    ("compat", "start", "ball"),
    [
        ("none", None, True),
        ("official-v1", None, False),
        *((compat, start, start == "ball") for compat in ("none", "official-v1") for start in ("ball", "image")),
    ],
)
@both_attacks
def test_start_in_the_ball_or_at_the_clamped_latent_whatever_the_modes(attack, compat, start, ball):
    z, u = drawn(N, Z_DIM), torch.rand(N, Z_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    networks = modes_networks()
    for net in networks:
        net.train()
    found = attack(*networks, Y, z=z, eps=0.1, num_steps=0, noise=replay(u), compat=compat, start=start)
    moved = z + 0.1 * (2 * u - 1)
    if ball:
        torch.testing.assert_close(found.delta, 0.1 * (2 * u - 1), rtol=1e-12, atol=0)
    else:
        expected = torch.where(moved < 0, 0.0, torch.where(moved > 1, 1.0, moved))
        torch.testing.assert_close(found.z_adv, expected, rtol=1e-12, atol=1e-12)
        assert found.delta.abs().max() > 1  # far outside the ball
    assert networks[1].modes == [compat == "official-v1"] * 2


def test_usong_searches_from_where_it_starts_gpgd_comes_back_to_the_ball():
    """official-v1's start: GPGD's projection brings delta back, USong's search stays at the clamped latent."""
    networks, z = (Linear(), LinearGenerator(), LinearLabels(), Y % 2), 3 * drawn(N, Z_DIM)
    common = {"z": z, "num_steps": 1, "step_size": 0.1, "start": "image"}
    assert run_gpgd(*networks, eps=0.2, **common).delta.abs().max() <= 0.2
    z_adv = usong(*networks, eps=0.2, **common).z_adv
    assert -0.1001 < z_adv.min() and z_adv.max() < 1.1001


@pytest.mark.parametrize("antialias", [False, True])
@both_attacks
def test_the_model_sees_the_images_made_smaller_as_asked(attack, antialias, acgan):
    model, generator, discriminator = acgan
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    found = attack(model, generator, discriminator, Y, z=drawn(N, 12), num_steps=1, step_size=0, antialias=antialias)

    def smaller(images: Tensor) -> Tensor:
        if not antialias:
            return images.view(N, 3, 32, 2, 32, 2).mean((3, 5))
        weights = torch.tensor([1, 3, 3, 1], dtype=torch.float64)  # a triangle of 4 pixels; 3, 3, 1 at the borders
        padded = F.pad(images, (1, 1, 1, 1))
        inside = F.pad(torch.ones_like(images), (1, 1, 1, 1))
        kernel = torch.outer(weights, weights).expand(3, 1, 4, 4)
        blur = [F.conv2d(t, kernel, stride=2, groups=3) for t in (padded, inside)]
        return blur[0] / blur[1]

    torch.testing.assert_close(seen[0], smaller(found.generated_adv), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.x_adv, smaller(found.generated_adv), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.x_nat, smaller(found.generated_nat), rtol=1e-10, atol=1e-12)


def test_published_gpgd_moves_first_and_projects_then():
    """From a start outside the ball one step decides each sign: it lands on a corner, or less than a step from one."""
    model, generator, y, z = Linear(), LinearGenerator(), Y % 2, drawn(N, Z_DIM)
    u = torch.full((N, Z_DIM), 0.5, dtype=torch.float64)
    found = gpgd(model, generator, y, z=z, num_steps=1, step_size=0.03, noise=replay(u), compat="official-v1")
    start = z.clamp(0, 1) - z
    ascent = torch.where(y == 0, 1.0, -1.0)[:, None] * (generator.matrix @ model.w).detach().sign()
    torch.testing.assert_close(found.delta, (start + 0.03 * ascent).clamp(-0.1, 0.1), rtol=0, atol=1e-12)


# -- USong ----------------------------------------------------------------------------------------------------------


def test_each_term_of_usong_has_its_sign_and_weight():
    """Gradients by hand with respect to delta, one term at a time, and their sum."""
    model, generator, labels, z = Linear(), LinearGenerator(), LinearLabels(), drawn(N, Z_DIM)
    y, eps = Y % 2, 0.3
    delta = (0.5 * drawn(N, Z_DIM, seed=7)).requires_grad_()
    x = generator(z + delta, y)

    def gradient(norm_weight: float, label_weight: float) -> Tensor:
        value = objectives.usong(
            model(x), labels(x)[1], delta, y, eps=eps, norm_weight=norm_weight, label_weight=label_weight
        )
        return torch.autograd.grad(value, [delta], retain_graph=True)[0]

    onehot = F.one_hot(y, 2) - model(x).softmax(1)
    ce = -(onehot[:, 1:] / 10) * (generator.matrix @ model.w) / N
    norm = torch.where(delta.abs() > eps, delta.sign(), 0.0) / (N * Z_DIM)
    wrong = F.one_hot(y, K + 1) - labels(x)[1].exp()
    label = -(wrong @ labels.linear.weight @ generator.matrix.T) / N
    torch.testing.assert_close(gradient(0, 0), ce)
    torch.testing.assert_close(gradient(7, 0) - ce, -7 * norm)
    torch.testing.assert_close(gradient(0, 9) - ce, -9 * label)
    torch.testing.assert_close(gradient(100, 100), ce - 100 * norm - 100 * label)
    assert (delta.abs() > eps).any() and (delta.abs() < eps).any()


def test_one_usong_step_is_a_sign_step_without_projection():
    model, generator, labels, z = Linear(), LinearGenerator(), LinearLabels(), drawn(N, Z_DIM)
    y, start = Y % 2, torch.full((N, Z_DIM), 0.75, dtype=torch.float64)
    found = usong(model, generator, labels, y, z=z, eps=0.02, num_steps=1, noise=replay(start))
    delta = torch.full((N, Z_DIM), 0.01, dtype=torch.float64, requires_grad=True)
    x = generator(z + delta, y)
    value = F.cross_entropy(model(x), y) - 100 * F.nll_loss(labels(x)[1], y)
    (grad,) = torch.autograd.grad(value, [delta])
    torch.testing.assert_close(found.delta, delta.detach() + 0.1 * grad.sign(), rtol=1e-12, atol=1e-12)
    assert found.delta.abs().max() > 0.02


def test_without_the_other_terms_usong_walks_to_the_corner_unbounded():
    model, generator, y = Linear(), LinearGenerator(), Y % 2
    found = usong(model, generator, LinearLabels(), y, norm_weight=0, label_weight=0, num_steps=30)
    ascent = torch.where(y == 0, 1.0, -1.0)[:, None] * (generator.matrix @ model.w).detach().sign()
    assert torch.equal(found.delta.sign(), ascent)
    torch.testing.assert_close(found.delta.abs(), torch.full_like(found.delta, 3.0), rtol=0, atol=0.0101)


def test_the_norm_term_holds_delta_near_the_ball():
    found = usong(Linear(), LinearGenerator(), LinearLabels(), Y % 2, norm_weight=1e6, num_steps=30)
    assert found.delta.abs().max() <= 0.11


def test_the_label_term_keeps_the_class():
    model, generator, labels, z = Linear(), LinearGenerator(), LinearLabels(), drawn(40, Z_DIM)
    y = torch.arange(40) % 2
    agree = {}
    for weight in (0, 100):
        found = usong(model, generator, labels, y, z=z, norm_weight=0, label_weight=weight, num_steps=20)
        agree[weight] = (labels(found.generated_adv)[1].argmax(1) == y).double().mean()
    assert agree[100] > 0.95 > 0.5 > agree[0]


# -- the published procedure, re-stated, in train mode, in float64 --------------------------------------------------


@pytest.fixture
def acgan() -> tuple[nn.Module, AcGenerator, AcDiscriminator]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.SiLU(), nn.Flatten(), nn.Linear(196, K)).double()
    generator, discriminator = AcGenerator(K, 12, width=2).double(), AcDiscriminator(K, width=2).double()
    for module in discriminator.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # the masks come from another stream than the published ones
    generator.embedding.weight.data.mul_(3)
    return model, generator, discriminator


@pytest.mark.parametrize("antialias", [False, True])
@both_attacks
def test_published_order_of_operations(attack, antialias, acgan):
    model, generator, discriminator = acgan
    z, u = drawn(N, 12), torch.rand(N, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    found = attack(model, generator, discriminator, Y, z=z, eps=0.05, step_size=0.1, num_steps=4,
                   antialias=antialias, compat="official-v1", noise=replay(u))  # fmt: skip
    after = {k: v.clone() for k, v in generator.state_dict().items()}

    generator.load_state_dict(before)
    nat = generator(z, Y)
    delta = nn.Parameter((z + 0.05 * (2 * u - 1)).clamp(0, 1) - z)
    for _ in range(4):
        x = generator(z + delta, Y)
        loss = F.cross_entropy(model(F.interpolate(x, (32, 32), mode="bilinear", antialias=antialias)), Y)
        if attack is usong:
            loss = loss - 100 * (delta.abs() - 0.05).relu().mean() - 100 * F.nll_loss(discriminator(x)[1], Y)
        loss.backward()
        delta.data = delta.data + 0.1 * delta.grad.sign()
        if attack is run_gpgd:
            delta.data = delta.data.clamp(-0.05, 0.05)
        delta.grad.zero_()
    adv = generator(z + delta, Y)

    torch.testing.assert_close(found.delta, delta.data, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.generated_adv, adv.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.generated_nat, nat.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.x_adv, shrink(adv.detach(), 32, antialias), rtol=1e-12, atol=1e-12)
    for name, value in generator.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-12, atol=1e-12)


@both_attacks
def test_puats_own_generator_can_be_searched_too(attack):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, K))
    labels = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, K + 1), nn.LogSoftmax(1))
    discriminator = _Pair(labels)
    found = attack(model, Generator(K, 8, 4), discriminator, Y, num_steps=2)
    assert found.x_adv.shape == (N, 3, 32, 32) and found.x_adv is found.generated_adv
    assert found.z.shape == (N, 8) and 0 <= found.x_adv.min() and found.x_adv.max() <= 1


class _Pair(nn.Module):
    def __init__(self, labels: nn.Module) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        return None, self.labels(x)


# -- modes, gradients, randomness -----------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", ["none", "official-v1"])
@pytest.mark.parametrize("training", [True, False])
@both_attacks
def test_modes_buffers_and_gradients(attack, training, compat):
    networks = modes_networks()
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in networks]
    for net in networks:
        net.train(training)
    attack(*networks, Y, num_steps=2, compat=compat)
    model, generator, discriminator = networks
    assert set(model.modes) == {False}
    expected = training and compat == "official-v1"
    assert generator.modes == [expected] * 4  # z, two steps, the result
    assert discriminator.modes == ([expected] * 2 if attack is usong else [])
    for net, buffers in zip(networks, before, strict=True):
        assert all(m.training is training for m in net.modules())
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        moved = any(not torch.equal(v, buffers[k]) for k, v in net.state_dict().items())
        assert moved == (expected and bool(net.modes) and net is not model)


@both_attacks
def test_modes_come_back_after_an_error(attack):
    model, generator, discriminator = (net.train() for net in modes_networks())
    model.head = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        attack(model, generator, discriminator, Y)
    assert model.training and generator.training and discriminator.training


@both_attacks
def test_in_eval_mode_samples_do_not_know_of_each_other(attack):
    networks, z, u = modes_networks(), drawn(N, Z_DIM), drawn(N, Z_DIM, seed=8).sigmoid()
    together = attack(*networks, Y, z=z, num_steps=5, noise=replay(u))
    for i in range(N):
        alone = attack(*networks, Y[i : i + 1], z=z[i : i + 1], num_steps=5, noise=replay(u[i : i + 1]))
        torch.testing.assert_close(alone.x_adv[0], together.x_adv[i], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alone.delta[0], together.delta[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("compat", ["none", "official-v1"])  # official-v1: with dropout
@both_attacks
def test_the_seed_decides_and_the_global_generator_stays(attack, compat):
    state = None
    found = []
    for seed in (0, 0, 1):
        networks = modes_networks()
        torch.rand(seed + len(found))  # other states of the global generator
        state = torch.get_rng_state()
        found.append(attack(*networks, Y, num_steps=3, seed=seed, compat=compat))
        assert torch.equal(torch.get_rng_state(), state)
    a, b, c = found
    assert torch.equal(a.x_adv, b.x_adv) and torch.equal(a.z, b.z)
    assert not torch.equal(a.z, c.z) and not torch.equal(a.delta, c.delta)


def test_two_calls_with_one_noise_draw_anew():
    noise = Noise(3, dtype=torch.float64)
    a, b = (gpgd(Linear(), LinearGenerator(), Y % 2, num_steps=0, noise=noise) for _ in range(2))
    assert not torch.equal(a.z, b.z) and not torch.equal(a.delta, b.delta)


def test_latents_are_replayed_by_name():
    z, u = drawn(N, Z_DIM), drawn(N, Z_DIM, seed=8).sigmoid()
    noise = RecordedNoise({"latent": [z], "latent_start": [u]}, dtype=torch.float64)
    recorded = gpgd(Linear(), LinearGenerator(), Y % 2, noise=noise)
    given = gpgd(Linear(), LinearGenerator(), Y % 2, z=z, noise=replay(u))
    assert torch.equal(recorded.x_adv, given.x_adv) and torch.equal(recorded.z, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_follows_the_model(dtype):
    found = gpgd(Linear(dtype), LinearGenerator(dtype), Y % 2, z=drawn(N, Z_DIM), num_steps=2)
    for tensor in (found.x_adv, found.x_nat, found.generated_adv, found.generated_nat, found.z, found.delta):
        assert tensor.dtype == dtype and not tensor.requires_grad


@both_attacks
def test_under_no_grad_with_frozen_parameters_and_small_integer_labels(attack):
    networks = (Linear(), LinearGenerator(), LinearLabels())
    expected = attack(*networks, Y % 2, num_steps=2)
    for net in networks:
        net.requires_grad_(False)
    with torch.no_grad():
        found = attack(*networks, (Y % 2).int(), num_steps=2)
    assert torch.equal(found.x_adv, expected.x_adv)


def test_no_labels_no_images():
    found = gpgd(Linear(), LinearGenerator(), torch.empty(0, dtype=torch.int64), num_steps=2)
    assert found.x_adv.shape == (0, 3, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -0.1}, "eps: -0.1"),
        ({"eps": float("nan")}, "eps: nan"),
        ({"step_size": -1}, "step_size: -1"),
        ({"num_steps": -1}, "num_steps: -1"),
        ({"image_size": 0}, "image_size: 0"),
        ({"compat": "official"}, "compat: 'official'"),
        ({"start": "corner"}, "start: 'corner' is not one of ball, image, None"),
        ({"y": torch.tensor([0, 1, K])}, "y: labels from 0 to 3, accepted: 0 to 2"),
        ({"y": torch.tensor([0, -1, 1])}, "y: labels from -1 to 1"),
        ({"y": torch.tensor([0, 1, 2])}, "y: label 2, accepted: 0 to 1, the model's classes"),
        ({"y": torch.tensor([[0, 1]])}, r"y: torch.int64 of shape \(1, 2\)"),
        ({"y": torch.tensor([0.0, 1.0])}, "y: torch.float32"),
        ({"z": torch.zeros(2, Z_DIM)}, r"z: shape \(2, 6\), expected \(3, 6\)"),
        ({"z": torch.zeros(3, Z_DIM, 1)}, r"z: shape \(3, 6, 1\), expected \(3, 6\)"),
        ({"z": torch.zeros(3, 7)}, r"z: shape \(3, 7\), expected \(3, 6\)"),
    ],
)
@both_attacks
def test_mistakes_are_told_by_name(attack, arguments, message):
    values = {"y": torch.tensor([0, 1, 0])} | arguments
    with pytest.raises(ValueError, match=f"^{message}"):
        attack(Linear(), LinearGenerator(), LinearLabels(), values.pop("y"), **values)


@pytest.mark.parametrize("name", ["norm_weight", "label_weight"])
def test_usongs_weights_are_not_negative(name):
    with pytest.raises(ValueError, match=f"^{name}: -1"):
        usong(Linear(), LinearGenerator(), LinearLabels(), Y % 2, **{name: -1})


def test_a_generator_without_z_dim_needs_z():
    class Bare(LinearGenerator):
        z_dim, num_classes = None, None

    with pytest.raises(ValueError, match=r"^z: needed, since Bare"):
        gpgd(Linear(), Bare(), Y % 2)
    assert gpgd(Linear(), Bare(), Y % 2, z=drawn(N, Z_DIM), num_steps=1).z.shape == (N, Z_DIM)
