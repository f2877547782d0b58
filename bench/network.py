"""Time of a network call against the time its arithmetic takes at the machine's measured peak.

The floor of a call is its operations (two for each multiply and add; convolutions and products of matrices, as torch
counts them) over the best rate of a large product or a large convolution in the same run and number format. What lies
above it is norms, activations, copies and the starting of kernels. One thread on a CPU.

* ct, mr, pet: the packaged priors; adm: the U-Net of DDS's CT prior, ncsnpp: DiffusionMBIR's, with random weights.
* "as it is": no compiler. "compiled": by torch.compile, ct only on a CPU. "graph": and replayed as one CUDA graph.

The error is the relative difference from float32 as it is.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench._common import Gate, Measured, Row, interleave, judge, measure, pair, relative_error
from recon3d.priors import ModelCard, load_prior
from recon3d.priors.network_prior import NetworkPrior
from recon3d.priors.networks import ADM, ADMConfig, NCSNpp, NCSNppConfig

PACKAGED = ("ct", "mr", "pet")
LEVEL = 0.3  # network units
# rounding to eight or eleven bits in every layer, seen in the estimate; and sums in another order
LIMITS = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 2e-3}


@dataclass(frozen=True)
class Case:
    """A network with the slices it is called on."""

    name: str
    pixels: int
    batch: int
    build: Callable[[str, str], NetworkPrior]  # (number format, compile)

    @property
    def words(self) -> str:
        return f"{self.name} {self.pixels}²" + (f" x {self.batch}" if self.batch > 1 else "")

    def state(self, device: str) -> Tensor:
        prior = self.build("float32", "off")
        shape = (self.batch, prior.card.channels, self.pixels, self.pixels)
        smooth = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return (prior.offset + prior.scale * smooth).to(device)


def run(quick: bool, device: str) -> list[Row]:
    rows: list[Row] = []
    for case in _cases(quick, device):
        rows += _rows(case, quick, device)
    return rows


def summary(rows: list[Row]) -> str:
    """Share of the peak, one line for each network and format."""
    lines = ["", "share of the peak measured in this run, by processor time on a CPU:"]
    for row in rows:
        if row.rival.startswith("floor"):
            share = row.cpu_ratio if row.device == "cpu" else row.ratio
            lines.append(f"  {row.case}, {row.direction}: {100 * share:.0f} % of {row.rival.removeprefix('floor at ')}")
    return "\n".join(lines)


def _cases(quick: bool, device: str) -> Iterator[Case]:
    batch = 1 if device == "cpu" else 8
    small, large = (96, 64) if quick and device == "cpu" else (192, 256)
    for name in PACKAGED:
        yield Case(name, small, batch, lambda dtype, how, name=name: load_prior(name, device, dtype, compile=how))
    for name in ("adm", "ncsnpp"):
        yield Case(name, large, batch, functools.partial(_random, name, device, quick))


def _random(name: str, device: str, quick: bool, dtype: str, how: str) -> NetworkPrior:
    torch.manual_seed(0)
    if name == "adm":
        card = ModelCard(name="adm", path="vp", prediction="eps")
        channels = (64, 64, 128, 128) if quick and device == "cpu" else (256, 256, 512, 512, 1024, 1024)
        config = ADMConfig(
            out_channels=2, model_channels=channels[0], channels=channels, attention=(len(channels) - 2,)
        )
        net: nn.Module = ADM(config)
    else:
        card = ModelCard(name="ncsnpp", path="ve", prediction="score", schedule={"sigma_min": 0.01, "sigma_max": 378.0})
        width = 32 if quick and device == "cpu" else 128
        net = NCSNpp(NCSNppConfig(width=width, channels=(width, 2 * width, 2 * width, 2 * width)))
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return NetworkPrior(net, card, device, dtype, compile=how)


def _rows(case: Case, quick: bool, device: str) -> list[Row]:
    u = case.state(device)
    truth = case.build("float32", "off").denoise(u, LEVEL * case.build("float32", "off").scale)
    operations = _operations(case, u)
    compiled = device == "cuda" or (not quick and case.name == "ct")
    rows: list[Row] = []
    plain: Measured | None = None
    # processors emulate float16
    for dtype in ("float32", "bfloat16", *(("float16",) if device == "cuda" else ())):
        found = _timed(case, dtype, u, truth, ("as it is", "compiled") if compiled else ("as it is",), quick, device)
        peak = _peak(dtype, device)
        floor = Measured(operations / peak * 1e3, operations / peak * 1e3)
        for name, mine in found.items():
            rivals = {f"floor at {peak / 1e9:.4g} GFLOP/s": floor}
            if name != "as it is":
                rivals["as it is"] = found["as it is"]
            elif plain is not None:
                rivals["float32"] = plain
            for rival, its in rivals.items():
                rows.append(pair("network", case.words, f"{dtype}, {name}", mine, rival, its, device))
        plain = plain or found["as it is"]
    return rows


def _timed(
    case: Case, dtype: str, u: Tensor, truth: Tensor, ways: tuple[str, ...], quick: bool, device: str
) -> dict[str, Measured]:
    thunks: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for way in ways:
        prior = case.build(dtype, "off" if way == "as it is" else "on")
        call = functools.partial(prior.denoise, u, LEVEL * prior.scale)
        name = "graph" if way == "compiled" and device == "cuda" else way
        start = time.perf_counter()
        errors[name] = relative_error(call(), truth)
        if way == "compiled":
            print(f"{case.words} {dtype}: compiled in {time.perf_counter() - start:.0f} s")
        judge(f"network, {case.words}, {dtype}, {name}", [Gate("error", errors[name], LIMITS[prior.dtype])])
        thunks[name] = call
    return measure(thunks, errors=errors, rounds=3 if quick else 7, device=device)


def _operations(case: Case, u: Tensor) -> float:
    """Of one call: two for each multiply and add of convolutions and products."""
    prior = case.build("float32", "off")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prior.denoise(u, LEVEL * prior.scale)
    return float(counter.get_total_flops())


@functools.cache
def _peak(dtype: str, device: str) -> float:
    """Operations per second of the best of a large product and large convolutions."""
    kind = getattr(torch, dtype)
    n, side, batch = (1024, 64, 1) if device == "cpu" else (8192, 128, 32)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
    works: dict[str, tuple[float, Callable[[], object]]] = {"product": (2.0 * n**3, lambda: a @ b)}
    for width in (128, 256):
        conv = nn.Conv2d(width, width, 3, padding=1).to(device, kind).to(memory_format=torch.channels_last)
        x = torch.randn(batch, width, side, side, device=device).to(kind).contiguous(memory_format=torch.channels_last)
        works[f"convolution {width}"] = (18.0 * width**2 * batch * side**2, functools.partial(conv, x))
    for _, call in works.values():
        call()
    found = interleave({name: call for name, (_, call) in works.items()}, rounds=7, device=device)
    # processor time on a CPU: other work on the machine is not the peak's fault
    spent = {name: t.cpu_ms if device == "cpu" else t.wall_ms for name, t in found.items()}
    return max(works[name][0] / (1e-3 * spent[name]) for name in works)
