"""Priors: what slices look like. A prior denoises canonical states u = x0 + sigma * eps in user units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recon3d.priors.base import ConditionCard, ModelCard, Prior, check_plane, condition_volume

if TYPE_CHECKING:
    import torch

    from recon3d.priors.network_prior import NetworkPrior
    from recon3d.priors.tiled import TiledPrior

__all__ = [
    "ConditionCard", "ModelCard", "Prior", "check_plane", "condition_volume", "load_prior", "packaged_priors",
]  # fmt: skip


def load_prior(
    name_or_path: str | Path,
    device: str | torch.device = "cpu",
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    tile: int | None = None,
    compile: Literal["auto", "on", "off"] = "auto",
) -> NetworkPrior | TiledPrior:
    """A trained prior, ready to denoise.

    Args:
        name_or_path: a packaged prior ("ct") or a folder with card.json and model.safetensors.
        device: where it runs.
        precision: "auto" is bfloat16 where the device computes with it natively, else float32; "float16" rounds eight
            times finer than bfloat16 and overflows beyond 65504, which activations of foreign networks may.
        tile: largest side of what a prior of whole slices is shown at once, in pixels; None shows it whole slices. A
            prior of patches (`card.patch`) is always shown patches of that size.
        compile: let torch compile the network, and on a GPU replay it as a CUDA graph; "auto" does so on a GPU.

    Raises:
        BadInput: there is no such prior, or its files are damaged.
    """
    from recon3d.priors.checkpoints import build_network, read_folder
    from recon3d.priors.network_prior import NetworkPrior
    from recon3d.priors.tiled import TiledPrior

    folder = find_prior(name_or_path)
    card, state = read_folder(folder)
    if card.prediction == "edm" and card.sigma_data is None:
        from recon3d.io import BadInput

        raise BadInput(folder / "card.json", "sigma_data is missing", "write the card with recon3d train")
    prior = NetworkPrior(build_network(card, state, folder), card, device, precision, compile=compile)
    side = card.patch or tile
    return prior if side is None else TiledPrior(prior, side)


def packaged_priors() -> tuple[str, ...]:
    """Names of the priors that come with recon3d."""
    return tuple(sorted(p.parent.name for p in _PACKAGED.glob("*/card.json")))


def find_prior(name_or_path: str | Path) -> Path:
    """The folder of a prior given by packaged name or path; nothing is read yet."""
    if str(name_or_path) in packaged_priors():
        return _PACKAGED / str(name_or_path)
    path = Path(name_or_path)
    if not path.is_dir():
        from recon3d.io import BadInput

        names = ", ".join(packaged_priors()) or "none"
        raise BadInput(path, "no such prior", f"give a folder or a packaged name ({names})")
    return path


_PACKAGED = Path(__file__).parent / "packaged"
