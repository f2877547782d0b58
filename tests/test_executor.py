"""The executor: one result whatever the batching, memory that runs out, slices that break, requests to stop."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from recon3d.engine.events import Events
from recon3d.engine.executor import (
    MAX_RETRIES,
    Executor,
    Interrupted,
    NonFiniteError,
    ResourceError,
    check_finite,
    out_of_memory,
)


class Slices:
    """One axial slice per view."""

    def gather(self, u, view):
        return u[view][None, None]

    def scatter(self, out, x0, view):
        out[view] = x0[0, 0]


class Network:
    """A few layers whose sums are long enough to show a change of order."""

    def __init__(self):
        torch.manual_seed(0)
        nn = torch.nn
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.GroupNorm(8, 32), nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.SiLU(), nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        ).eval()  # fmt: skip

    def denoise(self, u, sigma, cond=None):
        return self.net(u) * sigma


def volume(n=7):
    return torch.randn(n, 46, 38, generator=torch.Generator().manual_seed(1))


def run(prior, u, events=None, stop=None, **settings):
    with Executor(events=events, stop=stop, **settings) as executor:
        return executor.denoise(prior, Slices(), u, list(range(u.shape[0])), 0.5, level=4)


def test_batch_sizes_and_workers_give_the_same_bits():
    u, prior = volume(), Network()
    outputs = [run(prior, u, batch_size=b, workers=w) for b in (1, 3, 8) for w in (1, 2)]
    assert all(torch.equal(outputs[0], x) for x in outputs)
    assert outputs[0].abs().sum() > 0


def test_the_callers_thread_count_neither_matters_nor_changes():
    u, prior, before = volume(), Network(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(prior, u, workers=2))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_every_worker_computes_on_one_thread():
    seen = []

    class Watch:
        def denoise(self, u, sigma, cond=None):
            seen.append(torch.get_num_threads())
            time.sleep(0.002)
            return u

    run(Watch(), volume(9), workers=3)
    assert seen == [1] * 9


class Failing:
    """Raises at the given calls, counted over all threads."""

    def __init__(self, calls, error):
        self.calls, self.error, self.count, self.lock = calls, error, 0, threading.Lock()
        self.inner = Network()

    def denoise(self, u, sigma, cond=None):
        with self.lock:
            self.count += 1
            if self.count in self.calls:
                raise self.error
        return self.inner.denoise(u, sigma)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
     RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate")],
)  # fmt: skip
def test_out_of_memory_halves_the_batch_and_changes_nothing(error):
    u, events = volume(), []
    got = run(Failing({3}, error), u, Events(listeners=(events.append,)), batch_size=4, workers=4)
    assert torch.equal(got, run(Network(), u))
    told = [e for e in events if e["event"] == "out_of_memory"]
    assert [e["batch_size"] for e in told] == [2] and told[0]["level"] == 4
    assert [e["done"] for e in events if e["event"] == "slices"] == list(range(1, 8))


def test_out_of_memory_for_good_is_one_sentence():
    with pytest.raises(ResourceError, match=r"level 4 with 1 slice in flight .*resume"):
        run(Failing(set(range(1, 999)), MemoryError()), volume(), batch_size=8, workers=8)
    assert MAX_RETRIES == 3  # 8 -> 4 -> 2 -> 1


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="wrong shape"):
        run(Failing({2}, RuntimeError("wrong shape")), volume())
    assert not out_of_memory(ValueError("out of memory")) and out_of_memory(MemoryError())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_slice_is_named(bad):
    u = volume()
    u[5, 3, 3] = bad
    with pytest.raises(NonFiniteError, match="slice 5 is not finite after the prior at level 4") as caught:
        run(Network(), u, workers=2)
    assert (caught.value.level, caught.value.index) == (4, 5)
    with pytest.raises(NonFiniteError, match=r"slice 5 .* after consistency at level 2"):
        check_finite(u, "consistency", 2)
    check_finite(volume(), "consistency", 2)


def test_stop_ends_between_slices():
    calls = []

    class Slow:
        def denoise(self, u, sigma, cond=None):
            calls.append(1)
            time.sleep(0.01)
            return u

    with pytest.raises(Interrupted):
        run(Slow(), volume(50), stop=lambda: len(calls) > 4, workers=2)
    assert 4 < len(calls) < 12


def test_settings_are_checked():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Executor(batch_size=0)


@pytest.mark.gpu
def test_on_cuda_batches_are_padded_and_give_one_result():
    u, prior = volume().cuda(), Network()
    prior.net.cuda()
    seen = []
    inner = prior.net.forward
    prior.net.forward = lambda x: (seen.append(x.shape[0]), inner(x))[1]
    a = run(prior, u, batch_size=4)
    assert seen == [4, 4]
    assert torch.equal(a, run(prior, u, batch_size=4))
    assert (a - run(prior, u, batch_size=3)).abs().max() <= 1e-5 * a.abs().max()
