"""Files in and out: every reader behind one guard, every writer atomic."""

from pathlib import Path

from recon3d.io.atomic import atomic_write
from recon3d.io.dicom import DICOMImage, read_dicom
from recon3d.io.guard import BadInput, Limits
from recon3d.io.image import image_unit, read_image, write_activity
from recon3d.io.interfile import read_interfile_geometry, write_interfile, write_interfile_image
from recon3d.io.kspace import KSpace, KSpaceOptions
from recon3d.io.kspace_layout import write_kspace_hdf5
from recon3d.io.layout import write_measurement
from recon3d.io.measurement import Measurement, ReadOptions
from recon3d.io.mu_map import read_mu_map
from recon3d.io.nifti import NiftiHeader, read_nifti, read_nifti_header, write_nifti
from recon3d.io.pet import PETData, PETInfo, PETOptions
from recon3d.io.pet_folder import write_pet_folder
from recon3d.io.read import describe, read_kspace, read_measurement, read_pet, read_projections
from recon3d.io.units import MU_WATER_PER_MM, hu_to_mu, mu_to_hu

__all__ = [
    "MU_WATER_PER_MM",
    "BadInput",
    "DICOMImage",
    "KSpace",
    "KSpaceOptions",
    "Limits",
    "Measurement",
    "NiftiHeader",
    "PETData",
    "PETInfo",
    "PETOptions",
    "ReadOptions",
    "atomic_write",
    "demo_kspace_path",
    "demo_volume_path",
    "describe",
    "hu_to_mu",
    "image_unit",
    "mu_to_hu",
    "read_dicom",
    "read_image",
    "read_interfile_geometry",
    "read_kspace",
    "read_measurement",
    "read_mu_map",
    "read_nifti",
    "read_nifti_header",
    "read_pet",
    "read_projections",
    "write_activity",
    "write_interfile",
    "write_interfile_image",
    "write_kspace_hdf5",
    "write_measurement",
    "write_nifti",
    "write_pet_folder",
]


def demo_volume_path() -> Path:
    """The chest CT that ships with the package, in HU; its source and licence stand in ATTRIBUTION.md beside it."""
    return Path(__file__).resolve().parents[1] / "data" / "ct_chest_pyrad_lung1.nii.gz"


def demo_kspace_path() -> Path:
    """The k-space of a brain, 13 coils, two slices, that ships with the package; see ATTRIBUTION.md beside it."""
    return Path(__file__).resolve().parents[1] / "data" / "mr_brain_cartesian_13ch.h5"
