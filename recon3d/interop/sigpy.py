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

__all__ = ["as_linop", "nufft_linop"]

Step = Callable[[Tensor], Tensor]


def as_linop(operator: LinearOperator) -> Any:
    """Any recon3d operator as a Linop between operator.domain.shape and operator.range.shape.

    Args:
        operator: such as recon3d.operators.CTOperator or CartesianMRI.

    Returns:
        A sigpy Linop; .H is the operator's exact adjoint.

    Raises:
        ImportError: sigpy is not installed.
    """
    return _wrap(
        operator.forward, operator.adjoint, operator.domain.shape, operator.range.shape, type(operator).__name__
    )


def nufft_linop(ishape: Sequence[int], coord: Any, *, eps: float = 1e-3) -> Any:
    """The Linop of sigpy.linop.NUFFT, on recon3d's NUFFT: same coordinates, sign and scale.

    Args:
        ishape: shape of the images, leading axes included.
        coord: [..., d] in sigpy's unit, "index": [-N/2, N/2] along every axis, ordered as the image's last d axes.
        eps: relative L2 error on white data (sigpy's defaults reach 7e-3).

    Returns:
        A Linop from ishape to ishape[:-d] + coord.shape[:-1]; forward e^{-i} / sqrt(prod N), .H its exact adjoint.

    Raises:
        ImportError: sigpy is not installed.
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

    return _wrap(forward, adjoint, shape, shape[:-d] + samples, "NUFFT")


def _wrap(forward: Step, adjoint: Step, ishape: Sequence[int], oshape: Sequence[int], name: str) -> Any:
    try:
        from sigpy.linop import Linop
    except ImportError as error:
        raise ImportError(
            "recon3d.interop.sigpy: sigpy is not installed; install it with 'pip install sigpy'"
        ) from error

    class Wrapped(Linop):  # type: ignore[misc]  # sigpy is not annotated
        def __init__(self) -> None:
            super().__init__(list(oshape), list(ishape), repr_str=name)

        def _apply(self, given: Any) -> Any:
            return as_given(forward(to_torch(given)), given)

        def _adjoint_linop(self) -> Any:
            return _wrap(adjoint, forward, oshape, ishape, f"{name}.H")

    return Wrapped()
