"""What `recon3d demo` runs."""

from __future__ import annotations

from pathlib import Path

__all__ = ["run"]


def run(output: Path, measured: list[Path]) -> None:
    """Run the demonstration jobs into one folder each."""
    from recon3d import demo

    demo.run(output, measured)
