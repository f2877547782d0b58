"""Readers and writers of stored priors, one file per format."""

from __future__ import annotations

from recon3d.priors.checkpoints.folder import build_network, read_card, read_folder, write_folder

__all__ = ["build_network", "read_card", "read_folder", "write_folder"]
