"""Triton kernels; their sources live in the top-level kernels/ folder."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
