"""Where things are: volume grids and scan geometries as frozen values, in millimetres and radians.

Image coordinates: column j lies at X = (j - (nx-1)/2) dx, row i at Y = (i - (ny-1)/2) dy, Y pointing down the rows;
the rotation axis is at (0, 0). Detector cell k lies at (k - (n-1)/2) pitch + offset.
"""

from recon3d.geometry.ct import FanBeam, GeometryWarning, ParallelBeam, ScanGeometry, equiangular
from recon3d.geometry.grid import VolumeGrid

__all__ = ["FanBeam", "GeometryWarning", "ParallelBeam", "ScanGeometry", "VolumeGrid", "equiangular"]
