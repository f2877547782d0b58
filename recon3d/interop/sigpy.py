"""recon3d's operators as sigpy Linops, for sigpy's solvers and apps; sigpy must be installed.

Arrays are numpy or cupy, as sigpy's are, and share their memory with the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from recon3d.geometry import Trajectory
from recon3d.interop.arrays import as_given, to_torch
from recon3d.operators.base import LinearOperator
from recon3d.ops.nufft import nufft, nufft_adjoint, nufft_plan

try:
    from sigpy.linop import Linop
except ImportError as error:
    raise ImportError("recon3d.interop.sigpy: sigpy is not installed; install it with 'pip install sigpy'") from error

__all__ = ["as_linop", "nufft_linop"]


def as_linop(operator: LinearOperator) -> Linop:
    """Any recon3d operator as a Linop between operator.domain.shape and operator.range.shape.

    Args:
        operator: such as recon3d.operators.CTOperator or CartesianMRI.

    Returns:
        A sigpy Linop; .H is the operator's exact adjoint.
    """
    return _Wrapped(
        operator.forward, operator.adjoint, operator.domain.shape, operator.range.shape, type(operator).__name__
    )


def nufft_linop(ishape: Sequence[int], coord: Any, *, eps: float = 1e-3) -> Linop:
    """The Linop of sigpy.linop.NUFFT, on recon3d's NUFFT: same coordinates, sign and scale.

    Args:
        ishape: shape of the images, leading axes included.
        coord: [..., d] in sigpy's unit, "index": [-N/2, N/2] along every axis, ordered as the image's last d axes.
        eps: relative L2 error on white data (sigpy's defaults reach 7e-3).

    Returns:
        A Linop from ishape to ishape[:-d] + coord.shape[:-1]; forward e^{-i} / sqrt(prod N), .H its exact adjoint.

    Raises:
        ValueError: coordinates that do not fit the image or the unit.
    """
    points = to_torch(coord).detach().cpu()
    d = points.shape[-1]
    shape = tuple(int(n) for n in ishape)
    trajectory = Trajectory(points, shape[-d:], "index")
    plan = nufft_plan(trajectory.points, trajectory.shape, eps=eps)
    samples = tuple(points.shape[:-1])

    def forward(x: Tensor) -> Tensor:
        y = nufft(x, plan.to(x.device))
        return y.reshape(*y.shape[:-1], *samples)

    def adjoint(y: Tensor) -> Tensor:
        return nufft_adjoint(y.reshape(*y.shape[: y.ndim - len(samples)], -1), plan.to(y.device))

    return _Wrapped(forward, adjoint, shape, shape[:-d] + samples, "NUFFT")


class _Wrapped(Linop):  # type: ignore[misc]  # sigpy is not annotated
    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        ishape: Sequence[int],
        oshape: Sequence[int],
        name: str,
    ) -> None:
        self._forward, self._adjoint, self._name = forward, adjoint, name
        super().__init__(list(oshape), list(ishape), repr_str=name)

    def _apply(self, given: Any) -> Any:
        return as_given(self._forward(to_torch(given)), given)

    def _adjoint_linop(self) -> Linop:
        return _Wrapped(self._adjoint, self._forward, self.oshape, self.ishape, f"{self._name}.H")
