"""Laws that every operator obeys, written once; each op's test calls them for its cases."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def guarded(*shape: int, pad: int = 4096, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """A NaN-filled output between NaN guard bands, and a function that checks both after a kernel ran."""
    n = math.prod(shape)
    big = torch.full((n + 2 * pad,), math.nan, dtype=dtype, device=device)
    view = big[pad : pad + n].view(shape)

    def check() -> None:
        assert big[:pad].isnan().all() and big[pad + n :].isnan().all(), "wrote outside the output"
        assert not view.isnan().any(), "left part of the output unwritten"

    return view, check


def _dot(a: Tensor, b: Tensor) -> complex | float:
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    return torch.vdot(a.to(wide).flatten(), b.to(wide).flatten()).item()


def adjoint_gap(
    forward: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor, y: Tensor
) -> float:
    """|<A x, y> - <x, A* y>| / (|A x| |y|) with the inner products in float64."""
    ax, aty = forward(x), adjoint(y)
    norm = ax.to(torch.complex128).norm().item() * y.to(torch.complex128).norm().item()
    return abs(_dot(ax, y) - _dot(x, aty)) / norm


def check_adjoint(forward, adjoint, x: Tensor, y: Tensor, limit: float = 1e-6) -> None:
    """The adjoint is the transpose of the same discrete operator; 1e-6 is the promise for float32."""
    gap = adjoint_gap(forward, adjoint, x, y)
    assert gap <= limit, f"adjoint gap {gap:.2e} > {limit:.0e}"


def check_linear(op: Callable[[Tensor], Tensor], x1: Tensor, x2: Tensor, factor: float = 30.0) -> None:
    """op(2 x1 - 3 x2) = 2 op(x1) - 3 op(x2) to a few roundings of the dtype."""
    want = 2 * op(x1) - 3 * op(x2)
    got = op(2 * x1 - 3 * x2)
    eps = torch.finfo(want.dtype).eps
    assert (got - want).norm() <= factor * eps * (want.norm() + op(x1).norm() + op(x2).norm())


def check_batch_independent(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Slice k alone gives bitwise the slice k of the stack."""
    stack = op(x)
    for k in range(x.shape[0]):
        assert torch.equal(op(x[k : k + 1]), stack[k : k + 1]), f"slice {k} depends on its neighbours"


def check_threads(op: Callable[[], Tensor]) -> None:
    """One thread and several give the same bits."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = op()
        torch.set_num_threads(max(2, before))
        assert torch.equal(one, op()), "the result depends on the number of threads"
    finally:
        torch.set_num_threads(before)


def check_close_to_float64(got: Tensor, reference: Tensor, truth: Tensor, what: str = "kernel") -> None:
    """A kernel may be at most twice as far from float64 as the torch reference at the same dtype."""
    wide = truth.to(torch.float64)
    error = (got.to(torch.float64) - wide).norm()
    allowed = 2 * (reference.to(torch.float64) - wide).norm() + 4 * torch.finfo(got.dtype).eps * wide.norm()
    assert error <= allowed, f"{what}: error {error:.3e} > {allowed:.3e}"
