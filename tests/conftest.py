"""What every test runs under: no network, fixed threads, and a way to the shared measured data."""

from __future__ import annotations

import os
import socket
from pathlib import Path

# before triton is imported anywhere: without a GPU its kernels run interpreted
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any attempt to open a connection fails the test (local pipes and socketpairs stay)."""

    def refuse(self, address, *args):
        if isinstance(address, tuple):
            raise AssertionError(f"network access attempted: {address}")
        return _connect(self, address, *args)

    _connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


def data_dir() -> Path | None:
    """The folder of real scans: $RECON3D_DATA, else ../shared/data beside the checkout; None without either."""
    candidates = [os.environ.get("RECON3D_DATA"), Path(__file__).resolve().parents[2] / "shared" / "data"]
    return next((Path(c) for c in candidates if c and Path(c).is_dir()), None)


@pytest.fixture
def data():
    """A function from a relative path to a file of real data; skips the test where it is not at hand."""

    def find(name: str) -> Path:
        root = data_dir()
        if root is None or not (root / name).exists():
            pytest.skip(f"real data file {name} is not at hand (set RECON3D_DATA to its folder)")
        return root / name

    return find
