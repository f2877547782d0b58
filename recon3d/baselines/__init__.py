"""Classical reconstructions to compare with: each is one call on (measurement, operator), no recipe and no prior."""

from __future__ import annotations

from recon3d.baselines.cg_sense import cg_sense
from recon3d.baselines.cs import cs, cs_objective, tune_cs
from recon3d.baselines.dip import dip
from recon3d.baselines.fbp import fbp
from recon3d.baselines.osem import mlem, osem
from recon3d.baselines.osem_rdp import TunedRDP, osem_rdp, osem_rdp_objective, tune_osem_rdp
from recon3d.baselines.progress import Callback
from recon3d.baselines.sirt import sirt
from recon3d.baselines.tv import Tuned, tune, tv3d, tv3d_objective
from recon3d.baselines.zero_filled import zero_filled

__all__ = [
    "Callback",
    "Tuned",
    "TunedRDP",
    "cg_sense",
    "cs",
    "cs_objective",
    "dip",
    "fbp",
    "mlem",
    "osem",
    "osem_rdp",
    "osem_rdp_objective",
    "sirt",
    "tune",
    "tune_cs",
    "tune_osem_rdp",
    "tv3d",
    "tv3d_objective",
    "zero_filled",
]
