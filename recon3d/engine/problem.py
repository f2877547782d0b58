"""Everything that decides a reconstruction, from arrays or from a job file, checked before it starts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from recon3d.config import ConfigError, JobConfig, validate
from recon3d.engine.clock import Timed
from recon3d.engine.events import Events
from recon3d.engine.scan import Scan, load_scan
from recon3d.planes import PLANES, View
from recon3d.priors.base import ModelCard, Prior, check_planes
from recon3d.priors.per_plane import PerPlane, prior_of
from recon3d.recipes.model import Recipe

if TYPE_CHECKING:
    from recon3d.engine import loop

__all__ = ["Problem", "load_problem"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A scan with everything that decides its reconstruction.

    Attributes:
        scan: the measurement; all that depends on the modality.
        recipe: the method.
        prior: the denoiser as loaded, on the scan's device, or a PerPlane of several; `denoiser` is what the loop asks.
        seed: of all random numbers.
        accept_mismatch: use the prior outside what it was trained on, with a warning.
        files: path to sha256 of what was read for the prior.
    """

    scan: Scan
    recipe: Recipe
    prior: Prior
    seed: int = 0
    accept_mismatch: bool = False
    files: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> list[str]:
        """As the scan's, and whether the prior was made for such slices.

        Raises:
            ValueError: as the scan; or the prior was made for others and `accept_mismatch` is not set, or it needs an
                image beside the state and there is none.
        """
        sentences, seen = self.scan.check(), self.recipe.resolved().planes.seen
        for prior, planes in self._by_plane(seen):
            card = getattr(prior, "card", None)
            if card is None:
                continue
            if card.condition is not None and self.scan.guide is None:
                raise ValueError(
                    f"prior {card.name!r} is conditional: it needs an image of the same body on the same grid "
                    f"({card.condition.what or 'an image'}) beside the state; give it as guide or take another prior"
                )
            mismatches = [
                self.scan.prior_mismatch(card),
                check_planes(card, planes, self.scan.grid.spacing_mm),
                self._check_sigma(card),
            ]
            for sentence in filter(None, mismatches):
                if not self.accept_mismatch:
                    raise ValueError(f"{sentence}; or set accept_mismatch")
                sentences.append(sentence)
        sentences += filter(None, [self._check_noise()])
        return sentences

    @property
    def denoiser(self) -> Prior:
        """The prior as it meets this scan, in the scan's own unit."""
        return self._fitted[0]

    def job(self) -> loop.Job:
        """The loop's parts, ready to run on the device; its operator has a clock."""
        from recon3d.engine.assemble import assemble

        scan, weights = self.scan, self.scan.weights()
        cond = scan.condition(getattr(self.prior, "card", None))
        denoiser, image = self._fitted
        return assemble(
            self.recipe,
            Timed(scan.operator()),
            scan.y.to(scan.device),
            denoiser,
            spacing_mm=scan.grid.spacing_mm[0],
            weights=None if weights is None else weights.to(scan.device),
            seed=self.seed,
            start_image=image,
            cond=None if cond is None else cond.to(scan.device),
        )

    def prior_digest(self) -> str:
        """Digest of the prior: of its weights and card, or of its description when it has none; and of its scale."""
        text = " ".join(
            plane + (prior.card.model_dump_json() if getattr(prior, "card", None) is not None else repr(prior))
            for plane, prior in self._named()
        )
        # the scan or a caller may have set them apart from the card
        text += f" {self.denoiser.offset!r} {self.denoiser.scale!r}"
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _fitted(self) -> tuple[Prior, Tensor | None]:
        recipe = self.recipe.resolved()
        if not isinstance(self.prior, PerPlane):
            return self.scan.fit(self.prior, recipe)
        fits = {plane: self.scan.fit(prior, recipe) for plane, prior in self._named()}
        return PerPlane({plane: prior for plane, (prior, _) in fits.items()}), next(iter(fits.values()))[1]

    def _named(self) -> list[tuple[str, Prior]]:
        """The priors by plane; a single one has no name."""
        return list(self.prior.priors.items()) if isinstance(self.prior, PerPlane) else [("", self.prior)]

    def _by_plane(self, seen: Sequence[str]) -> list[tuple[Prior, Sequence[str]]]:
        """The priors that are asked, with the planes that each is to see.

        Raises:
            ValueError: no prior is given for a plane, or several for planes that are averaged.
        """
        if not isinstance(self.prior, PerPlane):
            return [(self.prior, seen)]
        if self.recipe.resolved().planes.kind == "averaged":
            prior_of(self.prior, [View(0, axis=axis) for axis in PLANES.values()])
        return [(self.prior.of(PLANES[plane]), (plane,)) for plane in seen]

    def _check_noise(self) -> str | None:
        recipe = self.recipe.resolved()
        groups = getattr(getattr(self.prior, "card", None), "slices", 1) > 1
        if recipe.noise.kind == "independent" or (recipe.planes.kind == "axial" and not groups):
            return None
        shown = "groups of slices" if recipe.planes.kind == "axial" else "slices across others"
        return (
            f"recipe {recipe.name}: noise.kind {recipe.noise.kind} ties the noise of neighbouring axial slices, and in "
            f"{shown} the prior expects white noise; set noise.kind to independent"
        )

    def _check_sigma(self, card: ModelCard) -> str | None:
        from recon3d.engine.assemble import levels
        from recon3d.priors.network_prior import check_sigma

        sigmas = [level.sigma for level in levels(self.recipe.resolved().trajectory, 1.0)]
        return check_sigma(card, max(sigmas), min(sigmas)) if sigmas else None


def load_problem(config: JobConfig, events: Events) -> Problem:
    """Read everything that a resolved job names.

    Raises:
        BadInput: the measurement or the prior cannot be used.
        ConfigError: a setting does not fit the measurement.
    """
    from recon3d.engine.checkpoint import sha256_file
    from recon3d.priors import find_prior, load_prior

    if config.prior is None:
        raise ConfigError("prior: none is named; resolve the job first")
    named = dict([("", config.prior), *config.priors.items()])
    folders = [find_prior(name) for name in named.values()]
    scan = load_scan(config, events)
    found = [file for folder in folders for file in sorted(folder.glob("*"))]
    weights = [file for file in found if file.suffix in (".json", ".safetensors")]
    loaded = {
        plane: load_prior(name, scan.device, tile=config.tile, compile=config.compute.compile)
        for plane, name in named.items()
    }
    prior: Prior = loaded.pop("")
    if loaded:
        prior = PerPlane({plane: loaded.get(plane, prior) for plane in PLANES})
    return Problem(
        scan=scan,
        recipe=validate(Recipe, config.recipe, "recipe"),
        prior=prior,
        seed=config.seed,
        accept_mismatch=config.accept_mismatch,
        files={str(file): sha256_file(file) for file in weights},
    )
