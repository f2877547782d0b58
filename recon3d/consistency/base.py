"""The contract of a data term, and the two that need no solver."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from recon3d.operators.base import LinearOperator
from recon3d.trajectory import Level

__all__ = ["Consistency", "Guidance", "Identity", "Projection", "Visit"]

On = Literal["estimate", "iterate"]


class Consistency(Protocol):
    """Turns an estimate into one that agrees with the measurement.

    Attributes:
        on: "estimate" corrects the prior's x0; "iterate" corrects the noisy state after renoising, as a few
            published samplers do.
    """

    @property
    def on(self) -> On: ...

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        """A corrected volume; x0 is not changed.

        Args:
            x0: [z, y, x], user units.
            y: measurement in the operator's range.
            operator: the scanner.
            level: where the trajectory is.
            state: duals of this part, checkpointed with the run; the part makes its own entries.
        """
        ...


@dataclass(frozen=True)
class Visit:
    """What a data term may ask about a visit of the prior beyond its estimate.

    Attributes:
        u: the state that was denoised, [z, y, x]; not to be changed.
        pull: v to (dx0/du)^T v, a volume each; asks the prior once more, this time with gradients.
    """

    u: Tensor
    pull: Callable[[Tensor], Tensor]


@runtime_checkable
class Guidance(Protocol):
    """A data term that looks at the state too, or passes through the prior (`recon3d.consistency.gradient`)."""

    @property
    def on(self) -> On: ...

    def guide(
        self,
        x0: Tensor,
        y: Tensor,
        operator: LinearOperator,
        level: Level,
        state: MutableMapping[str, Tensor],
        visit: Visit,
    ) -> Tensor:
        """As `Consistency.step`, for the visit that gave x0."""
        ...


@dataclass(frozen=True)
class Identity:
    """No data: the prior alone."""

    on: On = "estimate"

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        return x0


@dataclass(frozen=True)
class Projection:
    """x0 + relax A+ (y - A x0) with the operator's own approximate inverse (DDNM, Wang et al., ICLR 2023).

    Attributes:
        relax: 1 meets consistent data where A A+ = I; less leaves measurement noise out.
    """

    relax: float = 1.0
    on: On = "estimate"

    def __post_init__(self) -> None:
        if not 0 < self.relax < 2:
            raise ValueError(f"Projection: relax must be in (0, 2), got {self.relax}")

    def step(
        self, x0: Tensor, y: Tensor, operator: LinearOperator, level: Level, state: MutableMapping[str, Tensor]
    ) -> Tensor:
        return operator.pinv(y - operator(x0)).mul_(self.relax).add_(x0)
