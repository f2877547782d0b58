"""Classical reconstructions to compare with: each is one call on (measurement, operator), no recipe and no prior."""

from __future__ import annotations

from recon3d.baselines.fbp import fbp
from recon3d.baselines.progress import Callback
from recon3d.baselines.sirt import sirt
from recon3d.baselines.tv import Tuned, tune, tv3d, tv3d_objective

__all__ = ["Callback", "Tuned", "fbp", "sirt", "tune", "tv3d", "tv3d_objective"]
