"""Compiled networks: who gets one, what it answers, what happens without a compiler; on a GPU the whole chain."""

from __future__ import annotations

import math
import threading
import warnings

import pytest
import torch

from recon3d import demo, reconstruct
from recon3d.priors import ModelCard, load_prior
from recon3d.priors import compiled as module
from recon3d.priors.base import differentiable
from recon3d.priors.compiled import CompiledNetwork, compiles
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.networks import UNet, UNetConfig


def network():
    torch.manual_seed(0)
    net = UNet(UNetConfig(channels=(8, 16), blocks=1, embedding=16, group_size=8))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def prior(compile="on", device="cpu"):
    return NetworkPrior(network(), ModelCard(name="tiny", sigma_data=0.5), device, "float32", compile=compile)


@pytest.fixture
def compiler(monkeypatch):
    """Counts what is handed to torch.compile and what it is asked; its code is the network's own."""
    calls = []

    def compile(net, **options):
        def call(x, t):
            calls.append((tuple(x.shape), torch.is_inference_mode_enabled()))
            return net(x, t)

        calls.append(options)
        return call

    monkeypatch.setattr(module.torch, "compile", compile)
    return calls


def test_auto_compiles_on_a_gpu_only():
    assert compiles(torch.device("cuda"), "auto") and not compiles(torch.device("cpu"), "auto")
    assert compiles(torch.device("cpu"), "on") and not compiles(torch.device("cuda"), "off")
    with pytest.raises(ValueError, match="auto, on or off, got 'yes'"):
        compiles(torch.device("cpu"), "yes")


def test_the_compiled_network_answers_in_place_of_the_network(compiler):
    u = torch.randn(3, 1, 14, 18)
    want = prior("off").denoise(u, 0.3)
    assert not compiler
    assert torch.equal(prior().denoise(u, 0.3), want)
    # fixed shapes, and no choice that differs between processes
    assert compiler[0] == {"dynamic": False, "options": {"deterministic": True}}
    # one slice at a time on a CPU, in one mode; the first call is made twice
    assert compiler[1:] == [((1, 1, 14, 18), True)] * 4


def test_gradients_take_the_network_as_it_is(compiler):
    u = torch.randn(1, 1, 8, 8, requires_grad=True)
    way = differentiable(prior())
    assert torch.autograd.grad(way.denoise(u, 0.3).sum(), u)[0].abs().sum() > 0
    assert not compiler


def test_without_a_compiler_auto_goes_on_with_a_warning_and_on_says_why(monkeypatch):
    def compile(net, **options):
        def call(x, t):
            raise RuntimeError("Failed to find C compiler.\nmore")

        return call

    monkeypatch.setattr(module.torch, "compile", compile)
    net, x, t = network().for_inference(torch.float32), torch.randn(1, 1, 8, 8), torch.zeros(1)
    with pytest.warns(UserWarning, match=r"not compiled and runs as it is: Failed to find C compiler\.$"):
        willing = CompiledNetwork(net, fall_back=True)
        assert torch.equal(willing(x, t), net(x, t))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        willing(x, t)
    with pytest.raises(RuntimeError, match="C compiler"):
        CompiledNetwork(net)(x, t)


@pytest.mark.parametrize("fall_back", [True, False])
def test_memory_that_runs_out_is_not_taken_for_a_missing_compiler(monkeypatch, fall_back):
    failures = [torch.OutOfMemoryError("CUDA out of memory"), None]

    def compile(net, **options):
        def call(x, t):
            if (error := failures.pop(0)) is not None:
                raise error
            return net(x, t)

        return call

    monkeypatch.setattr(module.torch, "compile", compile)
    net, x, t = network().for_inference(torch.float32), torch.randn(1, 1, 8, 8), torch.zeros(1)
    fast = CompiledNetwork(net, fall_back)
    with pytest.raises(torch.OutOfMemoryError):
        fast(x, t)
    failures.append(None)
    assert torch.equal(fast(x, t), net(x, t))  # the executor tries again with fewer slices


def test_threads_compile_once(compiler):
    way, u = prior(), torch.randn(1, 1, 8, 8)
    found = []
    threads = [threading.Thread(target=lambda: found.append(way.denoise(u, 0.3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiler) == 1 + 1 + 4 and all(torch.equal(found[0], x) for x in found)


def test_graphs_are_kept_for_each_size_and_replaced_for_each_batch(monkeypatch):
    made = []

    class Graph:
        def __init__(self, call, x, t, pool):
            made.append((tuple(x.shape), pool))

    monkeypatch.setattr(module, "_Graph", Graph)
    monkeypatch.setattr(module.torch.cuda, "graph_pool_handle", lambda: "pool")
    fast, t = CompiledNetwork(network()), torch.zeros(1)
    first = fast._recorded(torch.zeros(4, 1, 8, 8), t)
    other = fast._recorded(torch.zeros(4, 1, 8, 16), t)
    assert fast._recorded(torch.zeros(4, 1, 8, 8), t) is first and len(made) == 2
    fast._recorded(torch.zeros(2, 1, 8, 8), t)  # memory ran out
    assert fast._recorded(torch.zeros(4, 1, 8, 16), t) is other
    assert fast._recorded(torch.zeros(4, 1, 8, 8), t) is not first
    for n in range(20):
        fast._recorded(torch.zeros(1, 1, 8, 24 + 8 * n), t)
        assert len(fast._graphs) <= 4
    assert {pool for _, pool in made} == {"pool"}


@pytest.mark.slow
def test_the_compilers_code_agrees_on_a_cpu():
    u = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    want, got = prior("off").denoise(u, 0.3), prior("on").denoise(u, 0.3)
    # sums of a few hundred products in another order
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert torch.equal(got[1:], prior("on").denoise(u[1:], 0.3))


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_graphs_replay_what_the_network_answers():
    u = torch.randn(4, 1, 32, 40, generator=torch.Generator().manual_seed(1)).cuda()
    plain, fast = prior("off", "cuda"), prior("on", "cuda")
    first = fast.denoise(u, 0.3)
    # convolutions take float32 apart into ten bits (TF32), so a last digit that differs can grow to 2^-11 of a product
    assert (first - plain.denoise(u, 0.3)).abs().max() < 1e-3 * first.abs().max()
    kept = first.clone()
    # another level and another state through the same graph, which leaves earlier answers alone
    second = fast.denoise(u.flip(0), 1.7)
    assert (second - plain.denoise(u.flip(0), 1.7)).abs().max() < 1e-3 * second.abs().max()
    assert torch.equal(first, kept) and torch.equal(fast.denoise(u, 0.3), kept)
    # another size shares the graph's memory, another batch takes its place, and the first answer comes back to the bit
    part = plain.denoise(u[:, :, :16], 0.3)
    for _ in range(2):
        assert (fast.denoise(u[:, :, :16], 0.3) - part).abs().max() < 1e-3 * part.abs().max()
        assert torch.equal(fast.denoise(u, 0.3), kept)
    assert len(fast._compiled._graphs) == 2
    fast.denoise(u[:2], 0.3)
    assert len(fast._compiled._graphs) == 2 and torch.equal(fast.denoise(u, 0.3), kept)


@pytest.mark.gpu
def test_a_graph_holds_what_is_in_a_row_apart_from_its_neighbours():
    u = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(2)).cuda()
    fast = prior("on", "cuda")
    there, here = fast.denoise(u, 0.3)[1:2], fast.denoise(u.flip(0), 0.3)[2:3]
    assert (there - here).abs().max() < 1e-3 * here.abs().max()
    assert (there - fast.denoise(u, 0.3)[2:3]).abs().max() > 0.1 * here.abs().max()


def psnr(job, device, precision, compile):
    way = load_prior("ct", device, precision, compile=compile)
    found = reconstruct(job.y, job.geometry, job.grid, prior=way, noise=job.noise, device=device).volume
    peak = 0.0193  # 1000 HU
    return 10 * math.log10(peak**2 / float((found - job.reference).square().mean()))


@pytest.mark.slow
def test_a_half_precision_reconstruction_is_that_of_float32_to_a_twentieth_of_a_decibel():
    job = demo.chest(slices=1)
    want = psnr(job, "cpu", "float32", "off")
    assert all(abs(psnr(job, "cpu", half, "off") - want) < 0.05 for half in ("bfloat16", "float16"))


@pytest.mark.gpu
def test_a_compiled_or_half_precision_reconstruction_is_that_of_float32_to_a_twentieth_of_a_decibel():
    job = demo.chest(slices=8)
    want = psnr(job, "cuda", "float32", "off")
    for precision, compile in (("bfloat16", "off"), ("float16", "off"), ("float32", "on"), ("bfloat16", "on")):
        assert abs(psnr(job, "cuda", precision, compile) - want) < 0.05, (precision, compile)
