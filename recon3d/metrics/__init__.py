"""How close a volume is to a reference and to its measurement; one fixed definition of every figure."""

from recon3d.metrics.calibration import calibration, interval_factor, order_rank
from recon3d.metrics.compare import PLANES, compare, data_fit
from recon3d.metrics.figures import nmse, psnr, rmse, ssim, through_plane
from recon3d.metrics.vif import vif

__all__ = [
    "PLANES", "calibration", "compare", "data_fit", "interval_factor", "nmse", "order_rank", "psnr", "rmse", "ssim",
    "through_plane", "vif",
]  # fmt: skip
