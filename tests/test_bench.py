"""The timing harness: a failed gate refuses, rivals are timed in turn, rows are kept, truths are true."""

import csv
import math
import sys
import time

import numpy as np
import pytest
import torch

from bench import _common, _goals, _nufft_rivals, job_pet, network, nufft, pet
from bench._common import Gate, Refused, compare
from recon3d.geometry import scanner
from recon3d.ops import joseph3d
from recon3d.priors import load_prior


def rows(error=0.0):
    return compare(
        "nothing", "1 ms", "wait", lambda: time.sleep(1e-3), {"slower": lambda: time.sleep(4e-3)},
        gates=[Gate("error", error, 1e-6)], errors={"slower": 0.5}, rounds=1,
    )  # fmt: skip


def test_ratio_is_rival_over_ours():
    (row,) = rows()
    # a loaded machine stretches both, never turns the order round
    assert row.ratio > 1.5 and row.ratio == row.rival_ms / row.ours_ms
    assert row.rival_error == 0.5 and row.ours_cpu_ms < row.ours_ms


@pytest.mark.parametrize("error", [1e-5, math.nan, math.inf])
def test_failed_gate_refuses_to_time(error):
    with pytest.raises(Refused, match="nothing, 1 ms, wait: not timed, error is"):
        rows(error)


def test_no_gate_is_refused():
    with pytest.raises(ValueError, match="at least one gate"):
        compare("nothing", "", "", lambda: None, {}, gates=[])


def test_peak_memory_sees_a_temporary():
    assert _common.peak_mb(lambda: torch.ones(32 << 18).sum()) == pytest.approx(32, abs=4)


def test_rows_are_appended(tmp_path):
    for _ in range(2):
        _common.record(rows(), tmp_path)
    with (tmp_path / "nothing.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 2 and kept[0]["rival"] == "slower" and "torch" in kept[0]["versions"]
    assert "slower" in _common.table(rows())


def test_slow_contender_stops_after_two_turns():
    calls = {"quick": 0, "slow": 0}

    def work(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    names = {"quick": 0.03, "slow": 0.06}
    thunks = {k: (lambda k=k, v=v: work(k, v)) for k, v in names.items()}
    _common.interleave(thunks, rounds=4, slow_s=0.05)
    assert calls == {"quick": 4, "slow": 2}


def test_measured_work_adds_and_scales():
    one, two = _common.Measured(1.0, 2.0, 5.0, 0.1), _common.Measured(3.0, 4.0, 2.0, 0.3)
    assert one.plus(two.times(2)) == _common.Measured(7.0, 10.0, 5.0, 0.3)


def test_goals_are_judged_by_cpu_time_and_say_who_is_less_exact():
    mine, its = _common.Measured(1.0, 1.0, error=2e-3), _common.Measured(9.0, 4.0, error=1e-3)
    row = _common.pair("nufft", "case", "both", mine, "finufft, 8 of 128", its)
    wanted = _goals.goals("case", "both", {"finufft": (3, 5), "sigpy": (1, 1)}) + _goals.goals(
        "no", "both", {"x": (1, 1)}
    )
    lines = _goals.report([row], wanted).strip().splitlines()
    assert len(lines) == 2 and "4.0x" in lines[0] and ": met;" in lines[0] and "OURS LESS EXACT" in lines[0]
    assert lines[1] == "1 of 1 goals met"
    assert "not met" in _goals.report([row], _goals.goals("case", "both", {"finufft": (5, 6)}))


@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 5)])
def test_exact_transform_is_the_definition(shape):
    g = torch.Generator().manual_seed(0)
    points = (2 * torch.rand(11, len(shape), generator=g, dtype=torch.float64) - 1) * math.pi
    x, y = torch.randn(2, *shape, dtype=torch.complex64), torch.randn(2, 11, dtype=torch.complex64)
    pixels = torch.cartesian_prod(*(torch.arange(n) - n // 2 for n in shape)).double()
    matrix = torch.polar(torch.ones((), dtype=torch.float64), -points @ pixels.T) / math.sqrt(math.prod(shape))
    chosen, lines = torch.tensor([7, 0, 3]), tuple(torch.tensor([n - 1, 0]) for n in shape[:-1])
    samples, image = nufft.exact(points, shape, x, y, chosen, lines)
    want_y = x.flatten(1).to(torch.complex128) @ matrix.T
    want_x = (y.to(torch.complex128) @ matrix.conj()).reshape(2, *shape)
    torch.testing.assert_close(samples, want_y[:, chosen])
    torch.testing.assert_close(image, want_x[(slice(None), *lines)])


@pytest.mark.parametrize("absent", [False, True])
def test_toeplitz_kernel_is_the_normal_operator(absent, monkeypatch):
    if absent:
        monkeypatch.setitem(sys.modules, "finufft", None)
    else:
        pytest.importorskip("finufft")
    shape, points = (4, 6), np.random.default_rng(0).uniform(-math.pi, math.pi, (9, 2))
    pixels = torch.cartesian_prod(*(torch.arange(n) - n // 2 for n in shape)).double()
    matrix = torch.polar(torch.ones((), dtype=torch.float64), -torch.from_numpy(points) @ pixels.T) / math.sqrt(24)
    x = torch.randn(shape, dtype=torch.complex128)
    spectrum = torch.fft.fft2(x, s=(8, 12)) * _nufft_rivals.toeplitz_kernel(points, shape)
    want = (matrix.mH @ (matrix @ x.flatten())).reshape(shape)
    torch.testing.assert_close(torch.fft.ifft2(spectrum)[:4, :6], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tof", [None, pet.TIME], ids=["plain", "tof"])
@pytest.mark.parametrize("make", [pet.small_scanner, pet.list_mode])
def test_pet_rival_gets_the_same_lines(make, tof):
    """The ends handed to the library, taken as lines of their own, give our sinogram in the order it is turned into."""
    case = make(tof, quick=True, few=True)
    start, stop = (torch.from_numpy(e) for e in case.ends)
    some = slice(0, len(start), 1 + len(start) // 500)
    points = torch.cat((start[some], stop[some])).double()
    n = len(points) // 2
    pairs = torch.stack((torch.arange(n), torch.arange(n, 2 * n)), 1).int()
    bins = None if case.bins is None else torch.from_numpy(case.bins[some]).int()
    got = joseph3d(case.x.double(), points, pairs, case.spacing_mm, tof=tof, tof_bins=bins)
    ours = case.forward(case.x.double())
    torch.testing.assert_close(case.for_rival(ours)[some], got, rtol=1e-9, atol=1e-9)
    assert torch.equal(case.from_rival(case.for_rival(case.y)), case.y)


def test_pet_events_come_from_a_cylinder():
    device = scanner("mmr")
    pairs, bins = pet.cylinder_events(device, 20_000, 120.0, 220.0, pet.TIME)
    p0, p1 = (device.crystal_positions()[pairs[:, k]] for k in range(2))
    way, middle = p1 - p0, (p0 + p1) / 2
    nearest = np.abs(middle[:, 2] * way[:, 1] - middle[:, 1] * way[:, 2]) / np.hypot(way[:, 1], way[:, 2])
    assert len(pairs) == 20_000 and nearest.max() < 125 and bins.min() >= 0 and bins.max() < pet.TIME.bins
    # the mean |s| of lines through a uniform disc is 4 R / (3 pi)
    assert nearest.mean() == pytest.approx(4 * 120 / (3 * math.pi), rel=0.03)
    assert 28 < np.std((bins - 8) * pet.TIME.bin_mm) < 100


def test_clock_of_a_part_counts_every_call():
    clock = job_pet.Clock(lambda seconds: time.sleep(seconds) or "done")
    assert [clock(0.01), clock(seconds=0.02)] == ["done", "done"]
    assert clock.wall >= 0.03 and clock.cpu < clock.wall


def test_goals_of_pet_name_cases_that_are_timed():
    words = {make(tof, True, few=True).words for tof in (None, pet.TIME) for make in (pet.small_scanner, pet.list_mode)}
    assert words <= {goal.case for goal in pet.wanted(quick=True)}
    assert all(goal.must <= goal.want for quick in (True, False) for goal in pet.wanted(quick))


def test_operations_of_a_network_are_two_for_each_multiply_and_add():
    case = network.Case("toy", 32, 1, lambda dtype, how: load_prior("ct", "cpu", dtype, compile=how))
    net, counted = case.build("float32", "off")._net, []

    def count(layer, inputs, out):
        pixels = out.shape[-1] * out.shape[-2] if out.ndim == 4 else 1
        counted.append(2 * layer.weight.numel() * pixels * len(out))

    for layer in net.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    net(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    assert network._operations(case, case.state("cpu")) == sum(counted)


def test_shares_of_the_peak_go_by_processor_time_on_a_cpu():
    mine, floor = _common.Measured(20.0, 4.0), _common.Measured(1.0, 1.0)
    row = _common.pair("network", "ct", "float32, as it is", mine, "floor at 200 GFLOP/s", floor)
    assert "ct, float32, as it is: 25 % of 200 GFLOP/s" in network.summary([row])
