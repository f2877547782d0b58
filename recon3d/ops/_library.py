"""The torch operator library `recon3d`: definition, backends and lazy loading of the compiled kernels.

Every op file calls :func:`define` once; the torch dispatcher is the only backend table. `RECON3D_BACKEND=reference`
keeps every op on its torch reference and is honoured here alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import torch

from recon3d import _build

_LIBRARY = torch.library.Library("recon3d", "FRAGMENT")
_lock = threading.Lock()
_state: dict[str, Any] = {"loaded": None, "error": None}
OPS: dict[str, str] = {}


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register one op: schema, torch reference for every device, fake kernel and optionally autograd.

    Args:
        schema: torch schema without namespace, such as "dot(Tensor x, Tensor y) -> Tensor".
        reference: plain torch; the truth for tests and the kernel of last resort.
        fake: returns empty outputs of the right shape and dtype.
        backward: as in torch.library.register_autograd.
        setup_context: as in torch.library.register_autograd.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"recon3d::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"recon3d::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    OPS[name] = schema


def register_cuda(name: str, launcher: Callable[..., Any]) -> None:
    """Register a Triton launcher for CUDA tensors (an op has either this or a kernel in csrc/cuda, never both)."""
    if os.environ.get("RECON3D_BACKEND") != "reference":
        _LIBRARY.impl(name, launcher, "CUDA")


def ensure() -> bool:
    """Load the compiled kernels once, compiling them on first use; False leaves the torch reference in place.

    Raises:
        recon3d._build.BuildError: the build failed and RECON3D_BUILD=1 asks that this be an error.
    """
    if _state["loaded"] is None:
        with _lock:
            if _state["loaded"] is None:
                _state["loaded"] = _load()
    return bool(_state["loaded"])


def build_error() -> str | None:
    """Why the compiled kernels are not in use; None when they are (or nobody asked yet)."""
    return _state["error"]


def backends() -> dict[str, dict[str, bool]]:
    """For every op: which of reference, cpu and cuda kernels are registered."""
    ensure()
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: {
            "reference": True,
            "cpu": has(f"recon3d::{name}", "CPU"),
            "cuda": has(f"recon3d::{name}", "CUDA"),
        }
        for name in sorted(OPS)
    }


def _load() -> bool:
    if os.environ.get("RECON3D_BACKEND") == "reference":
        _state["error"] = "RECON3D_BACKEND=reference"
        return False
    try:
        torch.ops.load_library(str(_build.find_or_build()))
    except (_build.BuildError, OSError) as error:
        _state["error"] = str(error)
        if os.environ.get("RECON3D_BUILD") == "1":
            raise
        return False
    return True
