"""The resident loader: the right images in the right places, exact values, and no label that must not be there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from puat_fast.data import LabelledSampler, ResidentLoader, SemiSupervisedSampler, split_indices

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
N, K, B = 120, 3, 8


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(N) % K)
    return rng.integers(0, 256, (N, 3, 32, 32), dtype=np.uint8), labels, split_indices(labels, K, 30, 1, 0.2)


def sampler(split, kind="semi", seed=7):
    if kind == "labelled":
        return LabelledSampler(split.labelled, B, seed)
    return SemiSupervisedSampler(split.labelled, split.unlabelled if kind == "semi" else split.unlabelled[:0], B, seed)


def tensors(step):
    """Every tensor of a StepBatch by name, None where there is none."""
    found = {f"{k}.{name}": value for k, batch in enumerate(step.D) for name, value in vars(batch).items()}
    return found | {f"C.{name}": value for name, value in vars(step.C).items()}


def assert_same(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (value is None and b[name] is None) or torch.equal(value, b[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_disc", [0, 1, 5])
def test_step_holds_the_images_of_the_sampler_in_order(data, device, dtype, n_disc):
    images, labels, split = data
    loader = ResidentLoader(images, labels, sampler(split), device, dtype)
    batches = iter(sampler(split))
    scale = np.dtype(str(dtype).removeprefix("torch.")).type(255)

    def check(x, indices):
        assert x.dtype == dtype and x.device.type == device and x.shape == (B, 3, 32, 32) and x.is_contiguous()
        np.testing.assert_array_equal(x.cpu().numpy(), images[indices].astype(scale.dtype) / scale)  # bit for bit u/255

    for _ in range(3):
        step = loader.next_step(n_disc)
        assert len(step.D) == n_disc
        for disc in step.D:
            a, b = next(batches), next(batches)
            check(disc.x_l, a.labelled), check(disc.x_u, a.unlabelled), check(disc.x_ud, b.unlabelled)
            assert disc.y_l.dtype == torch.int64 and disc.y_l.tolist() == labels[a.labelled].tolist()
        c = next(batches)
        check(step.C.x_l, c.labelled), check(step.C.x_u, c.unlabelled)
        assert step.C.y_l.device.type == device and step.C.y_l.tolist() == labels[c.labelled].tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_every_value_is_exactly_u_over_255(device):
    images = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 3, 32, 32)
    loader = ResidentLoader(images, np.zeros(1, np.int64), LabelledSampler(np.zeros(1, np.int64), 1, 0), device)
    values = loader.next_step(0).C.x_l.flatten()[::12].cpu().numpy()
    np.testing.assert_array_equal(values, np.arange(256, dtype=np.float32) / np.float32(255))


@pytest.mark.parametrize("kind, size", [("none", 2 * B), ("labelled", B)])
def test_without_unlabelled_data(data, kind, size):
    images, labels, split = data
    loader = ResidentLoader(images, labels, sampler(split, kind), "cpu")
    batches = iter(sampler(split, kind))
    for _ in range(3):
        step = loader.next_step(2)
        for batch in [*step.D, step.C]:  # one batch of the sampler per update
            expected = next(batches)
            assert batch.x_u is None and batch.x_l.shape == (size, 3, 32, 32)
            assert batch.y_l.tolist() == labels[expected.labelled].tolist()
            np.testing.assert_array_equal((batch.x_l * 255).round().byte().numpy(), images[expected.labelled])
        assert all(disc.x_ud is None for disc in step.D)


@pytest.mark.parametrize("kind", ["semi", "none", "labelled"])
@pytest.mark.parametrize("n_disc", [0, 1, 5])
def test_images_per_step(data, kind, n_disc):
    images, labels, split = data
    loader = ResidentLoader(images, labels, sampler(split, kind), "cpu")
    step = tensors(loader.next_step(n_disc))
    assert loader.images_per_step(n_disc) == sum(len(x) for x in step.values() if x is not None and x.ndim == 4)


@pytest.mark.parametrize("poison", [-7, 2, 10**9])
def test_labels_of_unlabelled_and_validation_images_cannot_reach_training(data, poison):
    images, labels, split = data
    poisoned = labels.copy()
    poisoned[split.unlabelled] = poison
    poisoned[split.validation] = poison
    assert (poisoned != labels).any()
    clean_loader, poisoned_loader = (ResidentLoader(images, y, sampler(split), "cpu") for y in (labels, poisoned))
    for _ in range(20):
        assert_same(clean_loader.next_step(2), poisoned_loader.next_step(2))


def test_validation_images_are_not_drawn(data):
    images, labels, split = data
    marked = images.copy()
    marked[split.validation] = 255
    loader = ResidentLoader(marked, labels, sampler(split), "cpu")
    for _ in range(20):
        for x in tensors(loader.next_step(2)).values():
            assert x.ndim == 1 or x.flatten(1).min(dim=1).values.max() < 1


def test_an_unlabelled_image_given_as_labelled_stops_the_step(data):
    images, labels, split = data
    loader = ResidentLoader(images, labels, sampler(split), "cpu")
    loader.sampler.labelled[:] = split.unlabelled[0]
    with pytest.raises(RuntimeError, match="image without a label"):
        loader.next_step(0)


def test_resume(data, tmp_path):
    images, labels, split = data
    plan = [0, 0, 2, 0, 2, 1, 2, 2]
    straight, first, second = (ResidentLoader(images, labels, sampler(split, seed=s), "cpu") for s in (7, 7, 8))
    for n_disc in plan[:4]:
        straight.next_step(n_disc), first.next_step(n_disc)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for n_disc in itertools.chain(plan[4:], [5] * 10):
        assert_same(straight.next_step(n_disc), second.next_step(n_disc))


def test_steps_do_not_share_memory_with_the_dataset_or_each_other(data):
    images, labels, split = data
    before = images.copy()
    loader = ResidentLoader(images, labels, sampler(split), "cpu")
    step = loader.next_step(1)
    kept = step.C.x_l.clone()
    step.D[0].x_l.zero_()
    loader.next_step(1).C.x_l.zero_()
    assert torch.equal(step.C.x_l, kept)
    np.testing.assert_array_equal(images, before)


def test_read_only_images_are_fine(data, recwarn):
    images, labels, split = data
    frozen = images.copy()
    frozen.flags.writeable = False
    ResidentLoader(frozen, labels, sampler(split), "cpu").next_step(1)
    assert not recwarn.list


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: (x.astype(np.float32), y), "images: .*float32, expected N x 3 x 32 x 32 uint8"),
        (lambda x, y: (x, y[:-1]), r"labels: \(119,\) for 120 images"),
        (lambda x, y: (x[:50], y[:50]), "sampler: indices 0 to 119, there are 50 images"),
    ],
)
def test_refusals(data, change, message):
    images, labels, split = data
    with pytest.raises(ValueError, match=message):
        ResidentLoader(*change(images, labels), sampler(split), "cpu")
