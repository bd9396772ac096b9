"""Threads and processes of the loaders: their errors surface, and none is left behind. And which loader is taken."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest
import torch
from loader_cases import IMAGES, LABELS, PREFETCHING, assert_same, loader, running, sampler

from puat_fast.config import ConfigError
from puat_fast.data import LabelledSampler, make_loader
from puat_fast.data.loaders import choose, stream
from puat_fast.data.loaders.torch import TorchLoader


def settled(count):
    """Whether threads and processes come down to `count`; the kernel takes a moment to bury them."""
    end = time.monotonic() + 5
    while running() > count and time.monotonic() < end:
        time.sleep(0.02)
    return running() <= count


@pytest.fixture
def idle():
    """Threads and processes after each kind ran once: libraries keep a pool or a thread of their own."""
    for kind in PREFETCHING:
        with loader(kind) as made:
            made.next_step(0)
    time.sleep(0.1)
    return running()


@pytest.mark.parametrize("kind", PREFETCHING)
def test_nothing_is_left_after_close(kind, idle):
    with loader(kind) as made:
        for n_disc in (0, 2, 0, 0):
            made.next_step(n_disc)
        assert running() > idle
        made.close()
        made.close()
        assert settled(idle)
        made.next_step(0)  # begins anew
    assert settled(idle)


def break_it(kind, made, monkeypatch):
    if kind == "stream":
        made._gone = None
        monkeypatch.setattr(stream.np, "take", lambda *a, **k: made._gone[0])
    elif kind == "torch":
        made._dataset.images = None
    else:
        made._images = None


def mend_it(kind, made, monkeypatch):
    monkeypatch.undo()
    if kind == "torch":
        made._dataset.images = IMAGES
    elif kind == "dali":
        made._images = IMAGES


@pytest.mark.parametrize("kind", PREFETCHING)
def test_an_error_beside_surfaces_and_leaves_nothing(kind, idle, monkeypatch):
    with loader("resident") as straight, loader(kind) as made:
        assert_same(made.next_step(1), straight.next_step(1))
        made.close()
        break_it(kind, made, monkeypatch)
        with pytest.raises(TypeError, match=r"NoneType.* not subscriptable"):  # its own error, in the step that asks
            made.next_step(1)
        assert settled(idle)
        mend_it(kind, made, monkeypatch)
        assert_same(made.next_step(1), straight.next_step(1))  # no step was lost


def test_an_error_of_a_later_step_waits_for_that_step(idle, monkeypatch):
    calls, send = [], stream.send

    def third_fails(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk gone")
        return send(*arguments)

    monkeypatch.setattr(stream, "send", third_fails)
    with loader("resident") as straight, loader("stream") as made:
        for _ in range(2):
            assert_same(made.next_step(1), straight.next_step(1))
        with pytest.raises(OSError, match="disk gone"):
            made.next_step(1)
        assert settled(idle)
        assert_same(made.next_step(1), straight.next_step(1))


def test_a_killed_worker_stops_the_step(idle):
    with loader("torch") as made:
        made.next_step(0)
        with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            for _ in range(10):
                made.next_step(0)
    assert settled(idle)


def test_workers_leave_ctrl_c_to_the_trainer():
    with loader("torch") as made, loader("resident") as straight:
        for _ in range(6):  # both workers are at work
            assert_same(made.next_step(0), straight.next_step(0))
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        for _ in range(8):
            assert_same(made.next_step(0), straight.next_step(0))


def test_workers_and_threads_are_started_once(idle):
    with loader("torch") as made:
        made.next_step(1)
        first = {worker.pid for worker in multiprocessing.active_children()}
        for _ in range(5):
            made.next_step(1)
        assert {worker.pid for worker in multiprocessing.active_children()} == first and len(first) == 2


@pytest.mark.parametrize("kind", PREFETCHING)
def test_torchs_global_generator_is_left_alone(kind):
    before = torch.get_rng_state()
    with loader(kind) as made:
        made.next_step(1), made.next_step(0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", PREFETCHING)
def test_a_set_smaller_than_a_batch(kind):
    samples = [LabelledSampler(np.arange(3), 8, 0) for _ in range(2)]
    with loader(kind, samples[0], images=IMAGES[:3]) as actual, loader("resident", samples[1], images=IMAGES[:3]) as b:
        for n_disc in (0, 3):
            assert_same(actual.next_step(n_disc), b.next_step(n_disc))


def test_an_unlabelled_image_given_as_labelled_stops_the_step():
    for kind in PREFETCHING:
        with loader(kind) as made:
            made.sampler.labelled[:] = 50
            with pytest.raises(RuntimeError, match="image without a label"):
                made.next_step(0)


@pytest.mark.parametrize(("device", "free", "kind"), [
    ("cpu", 0, "resident"), ("cuda", 4000, "resident"), ("cuda", 3999, "stream"), ("cuda:1", 10**6, "resident"),
])  # fmt: skip
def test_what_auto_is(device, free, kind):
    asked = []

    def memory(device):
        asked.append(device)
        return free, 10**9

    assert choose(1000, torch.device(device), memory) == kind
    assert asked == ([] if device == "cpu" else [torch.device(device)])


def test_auto_is_resident_on_the_cpu_and_other_names_are_refused():
    assert make_loader("auto", IMAGES, LABELS, sampler(), "cpu").kind == "resident"
    with pytest.raises(ConfigError, match="loader: 'tape' is not one of auto, resident, stream, dali, torch"):
        make_loader("tape", IMAGES, LABELS, sampler(), "cpu")
    with pytest.raises(ValueError, match="num_workers: 0, expected at least 1"):
        TorchLoader(IMAGES, LABELS, sampler(), "cpu", num_workers=0)


def test_without_dali(monkeypatch):
    for name in ("nvidia.dali", "nvidia"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"loader: 'dali' needs .* pip install \"puat-fast\[dali\]\"") as caught:
        make_loader("dali", IMAGES, LABELS, sampler(), "cpu")
    assert "\n" not in str(caught.value)
