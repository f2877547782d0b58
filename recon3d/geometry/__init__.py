"""Where things are: volume grids and scan geometries as frozen values, in millimetres and radians.

Image coordinates: column j lies at X = (j - (nx-1)/2) dx, row i at Y = (i - (ny-1)/2) dy, Y pointing down the rows;
the rotation axis is at (0, 0). Detector cell k lies at (k - (n-1)/2) pitch + offset.

k-space: pixel i of N lies at n = i - N//2, and a sample at k radians per pixel sees sum_n x_n e^{-i k n}. Generators of
trajectories are in recon3d.geometry.mri.

PET: a volume is centred on the scanner, x to the patient's left, y to the back, z to the head; rings, crystals, lines
of response and the order of sinogram bins are in recon3d.geometry.pet.
"""

from recon3d.geometry.ct import FanBeam, GeometryWarning, ParallelBeam, ScanGeometry, equiangular
from recon3d.geometry.grid import VolumeGrid
from recon3d.geometry.mri import Trajectory
from recon3d.geometry.pet import TOF, Events, PETGeometry, PETScanner, pet_geometry, scanner, scanner_names

__all__ = [
    "TOF",
    "Events",
    "FanBeam",
    "GeometryWarning",
    "PETGeometry",
    "PETScanner",
    "ParallelBeam",
    "ScanGeometry",
    "Trajectory",
    "VolumeGrid",
    "equiangular",
    "pet_geometry",
    "scanner",
    "scanner_names",
]
