"""dot: per-slice float64 inner products of float32 stacks, against torch expressions of the same."""

from __future__ import annotations

import torch

from bench._common import Gate, Row, compare, relative_error
from recon3d.ops import dot


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for one stack of slices."""
    shape = (16, 128, 128) if quick else (64, 512, 512)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=g).to(device) for _ in range(2))
    rivals = {
        "torch float64": lambda: (x.double() * y.double()).flatten(1).sum(1),
        "torch float32": lambda: (x * y).flatten(1).sum(1),
    }
    truth = rivals["torch float64"]()
    return compare(
        "dot", f"{shape[0]} slices of {shape[1]}²", "value",
        lambda: dot(x, y, per_slice=True), rivals,
        gates=[Gate("error", relative_error(dot(x, y, per_slice=True), truth), 1e-12)],
        errors={k: relative_error(f(), truth) for k, f in rivals.items()},
        bytes_moved=2 * x.nbytes, rounds=3 if quick else 7, device=device,
    )  # fmt: skip
