"""cg: one conjugate gradient step, its scalars on the device, against eager torch and torch.compile.

The rivals keep float32 vectors and float64 scalars as tensors too, so nobody waits for the device. "eager" adds in
place and takes its inner products the way that keeps float64 (a product, then a float64 sum); "eager, float32 sums" is
what most code does: its scalars carry float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch._inductor.exc
from torch import Tensor

from bench._common import Gate, Row, compare, relative_error
from recon3d.ops import cg, cg_step_, dot


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for one volume: one step length for all, and one per slice."""
    shape = (8, 128, 128) if quick else (48, 256, 256) if device == "cpu" else (256, 512, 512)
    generator = torch.Generator().manual_seed(0)
    x0, r0, p0 = (torch.randn(shape, generator=generator).to(device) for _ in range(3))
    q = 1.5 * p0 + 0.1 * r0
    rows: list[Row] = []
    for per_slice in (False, True):
        rz = dot(r0, r0, per_slice)
        truth = [v.double() for v in (x0, r0, p0)]
        cg._reference(*truth, q.double(), rz.clone())

        def error(
            step: Callable[..., object], rz: Tensor = rz, truth: list[Tensor] = truth, per_slice: bool = per_slice
        ) -> float:
            vectors = [v.clone() for v in (x0, r0, p0)]
            step(*vectors, q, rz.clone())
            return max(relative_error(a, b) for a, b in zip(vectors, truth, strict=True))

        # repeated steps on the same vectors change their values and not the work
        mine, theirs = ([v.clone() for v in (x0, r0, p0)] for _ in range(2))
        eager = _eager(per_slice, torch.float64)
        plain = _eager(per_slice, torch.float32)
        rivals: dict[str, Callable[[], object]] = {
            "eager": lambda step=eager, rz=rz, v=theirs: step(*v, q, rz),
            "eager, float32 sums": lambda step=plain, rz=rz, v=theirs: step(*v, q, rz),
        }
        if not quick:
            compiled = torch.compile(eager)
            try:
                error(compiled)
                rivals["compiled"] = lambda step=compiled, rz=rz, v=theirs: step(*v, q, rz)
            except torch._inductor.exc.InductorError:
                pass  # torch 2.13 cannot compile the step with one length per slice
        rows += compare(
            "cg", f"{shape[0]} slices of {shape[1]}²", "step per slice" if per_slice else "step",
            lambda rz=rz, v=mine: cg_step_(*v, q, rz), rivals,
            gates=[Gate("error", error(cg_step_), 1e-6)],
            errors={"eager": error(eager), "eager, float32 sums": error(plain), "compiled": error(eager)},
            bytes_moved=(7 if per_slice else 10) * x0.nbytes, rounds=3 if quick else 7, device=device,
        )  # fmt: skip
    return rows


def _eager(per_slice: bool, wide: torch.dtype) -> Callable[..., Tensor]:
    def inner(a: Tensor, b: Tensor) -> Tensor:
        product = a * b
        return product.flatten(1).sum(1, dtype=wide) if per_slice else product.sum(dtype=wide)

    def shaped(scalar: Tensor, like: Tensor) -> Tensor:
        return (scalar[:, None, None] if per_slice else scalar).to(like.dtype)

    def step(x: Tensor, r: Tensor, p: Tensor, q: Tensor, rz: Tensor) -> Tensor:
        alpha = shaped(rz / inner(p, q), x)
        x.addcmul_(p, alpha)
        r.addcmul_(q, alpha, value=-1)
        rz_new = inner(r, r)
        p.mul_(shaped(rz_new / rz, x)).add_(r)
        return rz_new

    return step
