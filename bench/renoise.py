"""renoise: one step between noise levels with fresh noise, against the torch expressions of the same step.

The floor is memory: u, x0 and x0c are read once and u' is written once, as many bytes as two copies of a volume; the
rival "copy of as many bytes" is that floor. The rivals draw with torch.randn, which is faster than keyed noise in torch
("eager, keyed": the reference with the same Philox integers) but gives other noise for another batch or order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from bench._common import Gate, Row, compare, relative_error
from recon3d import noise
from recon3d.ops import DataTerm, NoiseKey, renoise
from recon3d.ops.philox import mixed_normals

SIGMA, NEXT, A, B = 0.8, 0.5, 0.6, 0.8
Draw = Callable[[], Tensor]


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for one stack of slices: plain step, in place, noise correlated along z, and the fused data terms."""
    shape = (8, 128, 128) if quick else (48, 256, 256) if device == "cpu" else (256, 512, 512)
    g = torch.Generator().manual_seed(0)
    u, x0, x0c = (torch.randn(shape, generator=g).to(device) for _ in range(3))
    n = shape[0]
    alone, along = noise.independent(n, seed=1), noise.iscs_mm(n, 1.0, 5.0, seed=1)
    mask = (torch.rand(shape[1:], generator=g) < 0.5).to(device)
    small = torch.nn.functional.avg_pool2d(x0c, 4)
    cases: list[tuple[str, NoiseKey, Tensor | DataTerm]] = [
        ("independent noise", alone, x0c),
        ("noise along z", along, x0c),
        ("noisy identity", alone, DataTerm("identity", x0c, sigma_y=0.3)),
        ("noisy mask", alone, DataTerm("mask", x0c, sigma_y=0.3, mask=mask)),
        ("noisy block mean of 4", alone, DataTerm("block_mean", small, sigma_y=0.1, factor=4)),
    ]
    rows: list[Row] = []
    rows += _draw(f"{n} slices of {shape[1]}²", u, alone, quick, device)
    for name, key, third in cases[:2] if quick else cases:
        rows += _case(f"{n} slices of {shape[1]}², {name}", u, x0, third, key, quick, device)
    return rows


def _draw(case: str, u: Tensor, key: NoiseKey, quick: bool, device: str) -> list[Row]:
    draw = lambda: key.draw(u.shape[1:], u.dtype, u.device)  # noqa: E731
    truth = key.draw(u.shape[1:], torch.float64, u.device)
    return compare(
        "renoise", case, "noise alone", draw, {"torch.randn": lambda: torch.randn_like(u)},
        gates=[Gate("error", relative_error(draw(), truth), 3e-7)],
        bytes_moved=u.nbytes, rounds=3 if quick else 7, device=device,
    )  # fmt: skip


def _case(
    case: str, u: Tensor, x0: Tensor, third: Tensor | DataTerm, key: NoiseKey, quick: bool, device: str
) -> list[Row]:
    expression = _expression(third)
    anchors, coefficients = key.on(u.device)
    used = int(key.anchors.max()) + 1

    def randn() -> Tensor:
        if bool((key.coefficients[:, 1] == 0).all()):
            return torch.randn_like(u)
        fields = torch.randn((used, *u.shape[1:]), device=u.device)
        c = coefficients[:, :, None, None]
        return c[:, 0] * fields[anchors[:, 0]] + c[:, 1] * fields[anchors[:, 1]]

    def keyed() -> Tensor:
        flat = mixed_normals(anchors, coefficients, u[0].numel(), key.seed, key.level, 0, u.dtype)
        return flat.reshape(u.shape)

    independent = used == u.shape[0]
    wide = third.double() if isinstance(third, Tensor) else _wide(third)
    z = key.draw(u.shape[1:], torch.float64, u.device)
    truth = _expression(wide)(u.double(), x0.double(), z)
    ours = renoise(u, x0, third, SIGMA, NEXT, A, B, key)
    theirs = relative_error(expression(u, x0, keyed()), truth)
    state, spare = u.clone(), torch.empty_like(u)

    def copies() -> None:
        spare.copy_(u)
        spare.copy_(x0)

    rivals: dict[str, Callable[[], object]] = {
        "eager": lambda: expression(u, x0, randn()),
        "eager, keyed": lambda: expression(u, x0, keyed()),
        "copy of as many bytes": copies,
    }
    errors = dict.fromkeys(("eager", "eager, keyed", "torch.compile", "torch.compile, randn"), theirs)
    if independent and not quick:
        # the compiler's own keyed noise, and torch.randn called from compiled code, which is the faster on a CPU
        for name, options in (("torch.compile", {}), ("torch.compile, randn", {"fallback_random": True})):
            compiled = torch.compile(lambda u, x0: expression(u, x0, torch.randn_like(u)), options=options)
            rivals[name] = functools.partial(compiled, u, x0)
    residual = (ours.double() - _expression(wide)(u.double(), x0.double(), torch.zeros_like(z))).var()
    expected = (truth - _expression(wide)(u.double(), x0.double(), torch.zeros_like(z))).var()
    common = {
        "gates": [
            Gate("error", relative_error(ours, truth), 2 * theirs + 1e-7),
            Gate("variance of the noise", abs(float(residual / expected) - 1), 1e-5),
        ],
        "errors": errors,
        "bytes_moved": 4 * u.nbytes,
        "rounds": 3 if quick else 7,
        "device": device,
    }
    step = lambda **options: renoise(u, x0, third, SIGMA, NEXT, A, B, key, **options)  # noqa: E731
    rows = compare("renoise", case, "step", step, rivals, **common)
    if isinstance(third, Tensor) and independent:
        within = lambda: renoise(state, x0, third, SIGMA, NEXT, A, B, key, inplace=True)  # noqa: E731
        some = {k: rivals[k] for k in rivals if k != "eager, keyed"}
        rows += compare("renoise", case, "step in place", within, some, **common)
    return rows


def _expression(third: Tensor | DataTerm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """u' as a function of (u, x0, z): what one would write in torch."""
    if isinstance(third, Tensor):
        return lambda u, x0, z: third + NEXT * (A * ((u - x0) / SIGMA) + B * z)
    term, f = third, third.factor
    y, spread = term.y, term.sigma_y * f
    lam = 1.0 if spread <= NEXT else NEXT * A / spread
    fresh = math.sqrt(NEXT**2 - (lam * spread) ** 2)
    if term.kind == "identity":
        return lambda u, x0, z: x0 + lam * (y - x0) + fresh * z
    if term.kind == "mask":
        mask = term.mask
        assert mask is not None
        return lambda u, x0, z: torch.where(
            mask, x0 + lam * (y - x0) + fresh * z, x0 + NEXT * (A * ((u - x0) / SIGMA) + B * z)
        )

    def up(v: Tensor) -> Tensor:
        return v.repeat_interleave(f, -1).repeat_interleave(f, -2)

    def down(v: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(v, f)

    def step(u: Tensor, x0: Tensor, z: Tensor) -> Tensor:
        both = NEXT * (A * ((u - x0) / SIGMA) + B * z)
        return x0 + both + up(lam * (y - down(x0)) - down(both) + fresh * down(z))

    return step


def _wide(term: DataTerm) -> DataTerm:
    return DataTerm(term.kind, term.y.double(), term.sigma_y, term.mask, term.factor)
