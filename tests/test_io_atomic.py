"""A writer killed at any moment leaves the old file or the new one, never a part of either."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from recon3d.io import read_measurement, read_nifti

ROOT = Path(__file__).resolve().parents[1]
KILLS = 3

WRITER = """
import torch
from recon3d.geometry import ParallelBeam, VolumeGrid, equiangular
from recon3d.io import Measurement, write_measurement, write_nifti
grid = VolumeGrid((40, 60, 64), (2, 1, 1))
beam = ParallelBeam(equiangular(60), 64, 1.0)
noise = 0.5 * torch.rand(40, 60, 64, generator=torch.Generator().manual_seed(0))
for k in range(1_000_000):
    values = noise + k
    write_nifti("a.nii", values, grid)
    write_nifti("a.nii.gz", values, grid)
    for name in ("a.h5", "a.npz"):
        write_measurement(name, Measurement(values, beam, None, None, "recon3d"))
    if k == 0:
        print("written", flush=True)
"""


def test_killed_writers(tmp_path):
    r = random.Random(0)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    partial = 0
    for _ in range(KILLS):
        writer = subprocess.Popen([sys.executable, "-c", WRITER], cwd=tmp_path, env=env, stdout=subprocess.PIPE)
        assert b"written" in writer.stdout.readline()
        time.sleep(r.uniform(0, 0.5))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for name, read in (
            ("a.nii", lambda p: read_nifti(p)[0]),
            ("a.nii.gz", lambda p: read_nifti(p)[0]),
            ("a.h5", lambda p: read_measurement(p).sinogram),
            ("a.npz", lambda p: read_measurement(p).sinogram),
        ):
            values = read(tmp_path / name)
            # one generation throughout
            assert values.shape == (40, 60, 64)
            assert torch.equal(values.floor(), values.flatten()[0].floor().expand_as(values))
        rest = {p.name for p in tmp_path.iterdir()} - {"a.nii", "a.nii.gz", "a.h5", "a.npz"}
        assert all(name.startswith(".") and name.endswith(".tmp") for name in rest)
        partial += len(rest)
        for name in rest:
            (tmp_path / name).unlink()
    assert partial > 0, "no kill met a writer at work: the test shows nothing"
