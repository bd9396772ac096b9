"""PGD for evaluation: the optimum where it is known, what it refuses, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from small_nets import heldout, trained
from torch import Tensor, nn

from puat_fast.attacks.pgd import ascend, attack_loss, pgd
from puat_fast.attacks.precision import searching
from puat_fast.noise import Noise
from puat_fast.testing import RecordedNoise

EPS = 8 / 255


class Linear(nn.Module):
    """Two classes, logits (0, <w, x>): the strongest L-inf attack on class 0 is x + eps sign(w), clipped."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(3 * 32 * 32, generator=g).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Logits N x 2."""
        score = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(score), score / 100], 1)


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


Y = torch.tensor([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_a_linear_model_is_attacked_optimally(x, loss, random_start):
    model = Linear()
    if loss == "cw":  # its gradient is zero once misclassified: let all images start well inside their class
        model.w.data /= 1e6
        Y_here = model(x).argmax(1)
    else:
        Y_here = Y
    x_adv = pgd(model, x, Y_here, loss=loss, num_steps=20, random_start=random_start)
    direction = torch.where(Y_here == 0, 1.0, -1.0)[:, None] * model.w.detach().sign()
    best = (x + EPS * direction.view_as(x)).clamp(0, 1)
    if loss == "ce":
        torch.testing.assert_close(x_adv, best, rtol=0, atol=1e-6)
    else:
        right = model(x_adv).argmax(1) == Y_here
        torch.testing.assert_close(x_adv[right], best[right], rtol=0, atol=1e-6)


def test_steps_are_sign_steps_of_step_size(x):
    inner = x * 0.5 + 0.25
    x_adv = pgd(Linear(), inner, Y, step_size=0.001, num_steps=5, random_start=False)
    torch.testing.assert_close((x_adv - inner).abs(), torch.full_like(x, 0.005), rtol=0, atol=1e-6)


@pytest.mark.parametrize("step_size", [1 / 255, 0.5])
def test_result_is_in_the_ball_and_the_range(x, step_size):
    x = x.round(decimals=0)  # all pixels at the ends of the range
    x_adv = pgd(Linear(), x, Y, step_size=step_size, num_steps=3)
    assert (x_adv - x).abs().max() <= EPS + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1


def test_eps_0_and_no_step_change_nothing(x):
    assert torch.equal(pgd(Linear(), x, Y, eps=0), x)
    unchanged = pgd(Linear(), x, Y, num_steps=0, random_start=False)
    assert torch.equal(unchanged, x) and unchanged.data_ptr() != x.data_ptr()
    start = pgd(Linear(), x, Y, num_steps=0)
    assert 0 < (start - x).abs().max() <= EPS + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_dtype_and_no_graph(x, dtype):
    x_adv = pgd(Linear(dtype), x.to(dtype), Y, num_steps=2)
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, dtype, False)


def test_an_empty_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    assert pgd(model, torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.int64), num_steps=2).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"x": torch.full((2, 3, 32, 32), 1.5)}, "x: values from 1.5 to 1.5"),
        ({"x": torch.full((2, 3, 32, 32), -0.1)}, "x: values"),
        ({"x": torch.full((2, 3, 32, 32), float("nan"))}, "x: values"),
        ({"x": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "x: dtype torch.uint8"),
        ({"y": torch.tensor([0, 1, 0])}, r"y: shape \(3,\), expected \(2,\)"),
        ({"eps": -0.1}, "eps: -0.1"),
        ({"eps": float("nan")}, "eps: nan"),
        ({"step_size": -1}, "step_size: -1"),
        ({"num_steps": -1}, "num_steps: -1"),
        ({"norm": "l1"}, "norm: 'l1'"),
        ({"loss": "dlr"}, "loss: 'dlr'"),
        ({"loss": "kl", "random_start": False}, "random_start: False, but loss kl has no gradient at x"),
        ({"num_steps": 2.5}, "num_steps: 2.5"),
        ({"restarts": 0}, "restarts: 0, accepted: integers >= 1"),
        ({"restarts": 2, "random_start": False}, "restarts: 2 with random_start=False would all be the same"),
        ({"restarts": 3, "start": torch.zeros(2, 3, 32, 32)}, "restarts: 3 with a given start"),
        ({"start": torch.zeros(2, 3, 32, 31)}, r"start: torch.float32 of shape \(2, 3, 32, 31\), expected"),
        ({"start": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, "start: torch.uint8"),
        ({"start": 0.5}, "start: float, expected floating point of x's shape"),
    ],
)
def test_mistakes_are_told_by_name(arguments, name):
    values = {"x": torch.zeros(2, 3, 32, 32), "y": torch.tensor([0, 1])} | arguments
    with pytest.raises(ValueError, match=f"^{name}"):
        pgd(Linear(), **values)


# -- L2 -------------------------------------------------------------------------------------------------------------

RADIUS = 128 / 255


def distance(a: Tensor, b: Tensor) -> Tensor:
    """L2, image by image."""
    return (a - b).double().flatten(1).norm(dim=1)


@pytest.mark.parametrize("random_start", [True, False])
def test_l2_attacks_a_linear_model_optimally(x, random_start):
    model, inner = Linear(), x * 0.5 + 0.25  # too far from 0 and 1 for the range to cut in
    attack = {"eps": RADIUS, "step_size": RADIUS / 4, "num_steps": 60, "norm": "l2"}
    x_adv = pgd(model, inner, Y, random_start=random_start, **attack)
    w = model.w.detach().view_as(x[0])
    direction = torch.where(Y == 0, 1.0, -1.0)[:, None, None, None] * w / w.norm()
    torch.testing.assert_close(x_adv, inner + RADIUS * direction, rtol=0, atol=1e-5)
    if not random_start:
        assert torch.equal(ascend(model, inner, inner, attack_loss("ce", Y), **attack), x_adv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("step_size", [15 / 255, 2.0])
def test_l2_result_is_in_the_ball_and_the_range(x, step_size, dtype):
    x = x.round(decimals=0).to(dtype)  # all pixels at the ends of the range
    x_adv = pgd(Linear(dtype), x, Y, eps=RADIUS, step_size=step_size, num_steps=3, norm="l2")
    assert (x_adv.shape, x_adv.dtype, x_adv.requires_grad) == (x.shape, dtype, False)
    assert (distance(x_adv, x) <= RADIUS * (1.02 if dtype == torch.bfloat16 else 1 + 1e-6)).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_l2_starts_in_all_directions_at_all_distances_up_to_eps():
    middle, y = torch.full((2000, 3, 4, 4), 0.5), torch.zeros(2000, dtype=torch.int64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    starts = [pgd(model, middle, y, eps=0.4, num_steps=0, norm="l2", seed=s) for s in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    lengths = distance(starts[0], middle) / 0.4
    assert lengths.max() <= 1 + 1e-6
    uniform = torch.linspace(0, 1, 2000, dtype=torch.float64)
    assert (lengths.sort().values - uniform).abs().max() < 0.045  # Kolmogorov-Smirnov at 1 in 1000
    units = torch.nn.functional.normalize((starts[0] - middle).flatten(1))
    assert units.mean(0).norm() < 0.05 and (units.square().mean(0) * 48 - 1).abs().max() < 0.2
    assert pgd(model, middle[:0], y[:0], norm="l2", num_steps=2).shape == (0, 3, 4, 4)


def test_the_seed_decides_and_the_global_generator_stays(x):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, c = (pgd(Linear(), x, Y, num_steps=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


class Strange(nn.Module):
    """Dropout, BatchNorm, in-place ReLU, another image size, no sign of a Classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Logits N x 5."""
        return self.head(self.net(images).flatten(1))


@pytest.mark.parametrize("training", [True, False])
def test_any_module_keeps_its_mode_buffers_and_gradients(training):
    torch.manual_seed(0)
    model, x, y = Strange().train(training), torch.rand(3, 3, 9, 11), torch.tensor([0, 4, 2])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a, b = pgd(model, x, y, num_steps=2), pgd(model, x, y, num_steps=2)
    assert torch.equal(a, b)  # no dropout
    assert model.training is training and all(m.training is training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_frozen_layer_in_a_training_model_stays_frozen():
    model = Strange().train()
    model.net[1].eval()
    pgd(model, torch.rand(3, 3, 9, 9), torch.tensor([0, 4, 2]), num_steps=1)
    assert model.training and not model.net[1].training


def test_the_mode_comes_back_after_an_error():
    model = Strange().train()
    with pytest.raises(ValueError, match=r"^y: label 77, accepted: 0 to 4, the model's classes"):
        pgd(model, torch.rand(2, 3, 9, 9), torch.tensor([0, 77]), num_steps=1)
    assert model.training


def test_under_no_grad_and_for_frozen_parameters(x):
    model = Linear().requires_grad_(False)
    with torch.no_grad():
        x_adv = pgd(model, x, Y, random_start=False)
    assert torch.equal(x_adv, pgd(Linear(), x, Y, random_start=False))


# -- where it begins, and how often ---------------------------------------------------------------------------------


def test_a_given_start_is_where_it_begins(x):
    model, start = Linear(), (x + 0.3).clamp(0, 1)
    before = start.clone()
    moved = pgd(model, x, Y, start=start, num_steps=1, step_size=0.001)
    ascent = torch.where(Y == 0, 1.0, -1.0)[:, None] * model.w.detach().sign()
    expected = (start + 0.001 * ascent.view_as(x)).clamp(x - EPS, x + EPS).clamp(0, 1)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-7)
    assert torch.equal(pgd(model, x, Y, start=start, num_steps=0), start) and torch.equal(start, before)
    own = pgd(model, x, Y, start=x, num_steps=3)
    assert torch.equal(own, pgd(model, x, Y, random_start=False, num_steps=3))


def restarted(loss: str, count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, list[Tensor]]:
    """(net, x, y, what `count` restarts find, what each of them finds alone), in float64."""
    net, (x, y) = copy.deepcopy(trained("relu")).double(), heldout(60)
    x = x.double()
    g = torch.Generator().manual_seed(2)
    draws = [torch.rand(x.shape, generator=g, dtype=torch.float64) for _ in range(count)]
    settings = {"eps": 0.15, "step_size": 0.03, "num_steps": 3, "loss": loss}
    alone = [pgd(net, x, y, noise=RecordedNoise({"rae": [u]}, dtype=torch.float64), **settings) for u in draws]
    together = pgd(net, x, y, restarts=count, noise=RecordedNoise({"rae": draws}, dtype=torch.float64), **settings)
    return net, x, y, together, alone


@pytest.mark.parametrize("loss", ["ce", "cw", "kl"])
def test_of_restarts_the_first_that_fools_counts_or_else_the_largest_loss(loss):
    net, x, y, found, alone = restarted(loss, 4)
    with torch.no_grad():
        fooled = torch.stack([net(a).argmax(1) != y for a in alone])
        values = torch.stack([torch.stack([attack_loss(loss, y[i : i + 1], net(x[i : i + 1]))(net(a[i : i + 1]))
                                           for i in range(len(x))]) for a in alone])  # fmt: skip
    chosen = torch.where(fooled.any(0), fooled.int().argmax(0), values.argmax(0))
    expected = torch.stack(alone)[chosen, torch.arange(len(x))]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert set(chosen.tolist()) == {0, 1, 2, 3}  # all four count somewhere
    assert fooled[0].sum() < fooled.any(0).sum() < len(x)


def test_restarts_in_l2_stay_in_the_ball():
    net, (x, y) = trained("relu"), heldout(60)
    attack = {"eps": 0.6, "step_size": 0.2, "num_steps": 2, "norm": "l2"}
    once, often = (pgd(net, x, y, restarts=n, **attack) for n in (1, 5))
    assert (distance(often, x) <= 0.6 * (1 + 1e-6)).all()
    right = [(net(found).argmax(1) == y) for found in (once, often)]
    assert torch.equal(once[~right[0]], often[~right[0]]) and right[1].sum() < right[0].sum()


def test_what_is_fooled_is_not_attacked_again():
    net, (x, y) = nn.Sequential(trained("relu")), heldout(60)
    rows: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    settings = {"eps": 0.15, "step_size": 0.03, "num_steps": 2}
    left = [int((trained("relu")(pgd(net, x, y, restarts=n, **settings)).argmax(1) == y).sum()) for n in (1, 2)]
    rows.clear()
    pgd(net, x, y, restarts=3, **settings)
    assert rows == [60] * 3 + [left[0]] * 3 + [left[1]] * 3 and 0 < left[1] < left[0] < 60
    rows.clear()
    pgd(net, x, (y + 1) % 10, restarts=9, **settings)  # all wrong from the start
    assert rows == [60] * 3


def test_one_restart_costs_no_further_forward():
    net, (x, y) = nn.Sequential(trained("relu")), heldout(4)
    rows: list[int] = []
    net.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    pgd(net, x, y, num_steps=7)
    assert rows == [4] * 7


def test_the_draws_of_restarts_do_not_depend_on_what_is_fooled():
    x, y = heldout(10)
    streams = [Noise(5), Noise(5)]
    for labels, noise in zip((y, (y + 1) % 10), streams, strict=True):
        pgd(trained("relu"), x, labels, num_steps=1, eps=0.01, restarts=3, noise=noise)
    assert torch.equal(*(noise.uniform("rae", (4,)) for noise in streams))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_that_is_set_around_it_is_the_models(precision):
    net, (x, y) = nn.Sequential(trained("relu")), heldout(20)
    low: list[bool] = []
    net.register_forward_pre_hook(lambda module, inputs: low.append(torch.is_autocast_enabled("cpu")))
    with searching(net, precision, x.device):
        found = pgd(net, x, y, num_steps=2)
    assert low == [precision == "bf16"] * 2
    assert found.dtype == torch.float32 and (found - x).abs().max() <= EPS + 1e-6


# -- KL -------------------------------------------------------------------------------------------------------------


def test_kl_goes_away_from_the_natural_output_whatever_the_label():
    net, (x, y) = copy.deepcopy(trained("relu")).double(), heldout(40)
    x = x.double()
    found = pgd(net, x, y, loss="kl", eps=0.1, step_size=0.02, num_steps=10)
    assert torch.equal(found, pgd(net, x, (y + 1) % 10, loss="kl", eps=0.1, step_size=0.02, num_steps=10))
    noise = Noise(0, dtype=torch.float64)
    natural, x_adv = net(x).softmax(1).detach(), (x + (2 * noise.uniform("rae", x.shape) - 1) * 0.1).clamp(0, 1)
    for _ in range(10):
        x_adv.requires_grad_()
        log_p = net(x_adv).log_softmax(1)
        (grad,) = torch.autograd.grad((natural * (natural.log() - log_p)).sum(), [x_adv])
        x_adv = torch.clamp(x_adv.detach() + 0.02 * grad.sign(), x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)


def test_kl_takes_the_natural_output_once_and_in_eval_mode():
    model, calls = Strange().train(), []
    model.register_forward_pre_hook(lambda m, inputs: calls.append((m.training, torch.is_grad_enabled())))
    pgd(model, torch.rand(3, 3, 9, 9), torch.tensor([0, 4, 2]), loss="kl", num_steps=2)
    assert calls == [(False, False), (False, True), (False, True)]


def test_cw_stops_at_misclassified_images(x):
    model = Linear()
    wrong = 1 - model(x).argmax(1)
    assert torch.equal(pgd(model, x, wrong, loss="cw", random_start=False), x)


def test_kl_needs_natural_logits_and_keeps_them_constant(x):
    logits = Linear()(x)
    loss = attack_loss("kl", Y, logits)
    assert float(loss(logits.detach())) == pytest.approx(0, abs=1e-6)
    other = torch.zeros_like(logits, requires_grad=True)
    loss(other).backward()
    assert logits.grad_fn is not None and other.grad is not None


def test_ascend_runs_the_model_in_the_mode_it_is_in():
    torch.manual_seed(0)
    model, x = Strange().train(), torch.rand(3, 3, 9, 9)
    ascend(model, x, x, attack_loss("ce", torch.tensor([0, 1, 2])), eps=EPS, step_size=EPS, num_steps=4)
    assert model.training and int(model.net[1].num_batches_tracked) == 4
