"""A prior's files, each of which appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from recon3d.io.atomic import atomic_write

__all__ = ["write_bytes", "write_safetensors", "write_text"]


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; after a crash at any moment it holds either the old or the new bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8"))


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Write tensors atomically and return the bytes of the file (for a digest)."""
    from safetensors.torch import save

    content = save(
        {k: v.detach().to("cpu", memory_format=torch.contiguous_format).contiguous() for k, v in tensors.items()},
        metadata,
    )
    write_bytes(path, content)
    return content
