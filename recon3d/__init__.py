"""Whole CT, MRI and PET volumes from few, noisy or incomplete measurements, with 2D diffusion priors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "convert_modality", "enhance", "reconstruct", "reconstruct_mri", "reconstruct_pet"]

if TYPE_CHECKING:
    from recon3d.api import convert_modality, enhance, reconstruct, reconstruct_mri, reconstruct_pet


def __getattr__(name: str) -> Any:
    # torch and the loop are imported when first used, so that the command line answers at once
    if name in ("convert_modality", "enhance", "reconstruct", "reconstruct_mri", "reconstruct_pet"):
        from recon3d import api

        return getattr(api, name)
    raise AttributeError(f"module 'recon3d' has no attribute {name!r}")
