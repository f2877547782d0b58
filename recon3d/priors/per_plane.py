"""One prior per plane of slices, for recipes that show planes in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from recon3d.planes import PLANES, View
from recon3d.priors.base import ModelCard, Prior

__all__ = ["PerPlane", "prior_of"]


class PerPlane:
    """Priors by the plane whose slices they were made for (Lee et al., TPDM, ICCV 2023, arXiv 2303.08440).

    Args:
        priors: "axial", "coronal" or "sagittal" to the prior of its slices; the first one's card, offset and scale
            stand for all.

    Raises:
        ValueError: there is none, a plane is unknown, or they differ in offset, scale or slices seen together.
    """

    def __init__(self, priors: Mapping[str, Prior]) -> None:
        if not priors or not set(priors) <= set(PLANES):
            raise ValueError(f"PerPlane: name priors of axial, coronal or sagittal slices, got {list(priors)}")
        self.priors = dict(priors)
        first = next(iter(self.priors.values()))
        for plane, prior in self.priors.items():
            if (prior.offset, prior.scale) != (first.offset, first.scale):
                raise ValueError(
                    f"PerPlane: the prior of {plane} slices has offset {prior.offset:g} and scale {prior.scale:g}, "
                    f"another one {first.offset:g} and {first.scale:g}; train them in one network unit"
                )
            if _slices(prior) != _slices(first):
                raise ValueError(
                    f"PerPlane: the prior of {plane} slices sees {_slices(prior)} together, another one "
                    f"{_slices(first)}; they must see the same number"
                )
        self.card: ModelCard = first.card
        self.offset, self.scale = first.offset, first.scale

    def of(self, axis: int) -> Prior:
        """The prior of slices across an axis of the volume.

        Raises:
            ValueError: there is none.
        """
        for plane, prior in self.priors.items():
            if PLANES[plane] == axis:
                return prior
        plane = list(PLANES)[axis]
        raise ValueError(f"PerPlane: no prior of {plane} slices is given, only of {', '.join(self.priors)}")

    def denoise(self, u: Tensor, sigma: float, cond: Tensor | None = None) -> Tensor:
        """Refused: whoever asks has to say which plane's prior is meant, see `prior_of`."""
        raise TypeError("PerPlane.denoise: ask the prior of a plane, `of(axis)`")


def prior_of(prior: Prior, views: Iterable[View]) -> Prior:
    """The prior that is asked about views: itself, or of several by plane the one of theirs.

    Raises:
        ValueError: priors by plane are to answer for slices of several planes at once.
    """
    if not isinstance(prior, PerPlane):
        return prior
    axes = {view.axis for view in views}
    if len(axes) > 1:
        raise ValueError("one prior per plane goes with planes.kind in_turn; averaged planes share one prior")
    return prior.of(axes.pop())


def _slices(prior: Prior) -> int:
    card: ModelCard | None = getattr(prior, "card", None)
    return 1 if card is None else card.slices
