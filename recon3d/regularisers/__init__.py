"""How slices are tied to one another in the data term."""

from recon3d.regularisers.tvz import TVz

__all__ = ["TVz"]
