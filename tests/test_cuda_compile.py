"""Every CUDA source compiles for sm_80 and sm_90 without a GPU, spills nothing and keeps to its registers."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from recon3d import _build

CSRC = Path(__file__).parent.parent / "csrc"
# registers a thread may use; 128 lets two blocks of 256 threads share a multiprocessor, 80 lets three; gather_cells
# and interpolate_points want three and six blocks of 128 threads
BUDGET = {"forward_stack": 128, "adjoint_stack": 80, "gather_cells": 168, "interpolate_points": 80}
BUDGET |= {"forward_lines": 128, "adjoint_lines": 128, "adjoint_columns": 128}
# up to seven complex doubles of a butterfly
BUDGET |= {f"{kernel}Id": 128 for kernel in ("sense_lines_kernel", "sense_rows_in", "sense_columns", "sense_rows_out")}
DEFAULT_BUDGET = 64
ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")

_, NVCC = _build.compilers() if shutil.which("g++") or shutil.which("clang++") else (None, None)
SOURCES = sorted(CSRC.glob("cuda/*.cu"))


def resources(log: str) -> list[tuple[str, str, int, int, int]]:
    """(kernel, arch, registers, stack, spilled bytes) of every kernel in what ptxas -v says."""
    found = []
    for part in log.split("Compiling entry function")[1:]:
        name, arch = ENTRY.search("Compiling entry function" + part).groups()
        stack, stores, loads = map(int, FRAME.search(part).groups())
        found.append((name, arch, int(USED.search(part).group(1)), stack, stores + loads))
    return found


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    if NVCC is None:
        pytest.skip("nvcc is not on the path: CUDA sources cannot be compiled here")
    folder = tmp_path_factory.mktemp("cuda")

    def build(job: tuple[Path, str]) -> str:
        source, arch = job
        out = folder / f"{source.stem}-{arch}.o"
        command = [NVCC, *_build._NVCC_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-I{CSRC}"]
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    jobs = [(s, a) for s in SOURCES for a in _build.CUDA_ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(((s.stem, a) for s, a in jobs), pool.map(build, jobs), strict=True))


@pytest.mark.parametrize("arch", _build.CUDA_ARCHITECTURES)
@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_resources(logs, source, arch):
    kernels = resources(logs[source, arch])
    assert kernels, "no kernel in the log of ptxas"
    for name, target, registers, stack, spilled in kernels:
        assert target == arch
        budget = next((b for k, b in BUDGET.items() if k in name), DEFAULT_BUDGET)
        assert registers <= budget, f"{name}: {registers} registers, budget {budget}"
        assert (stack, spilled) == (0, 0), f"{name}: {stack} bytes of stack, {spilled} spilled"


def test_log_is_read():
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90'
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
    ptxas info    : Used 128 registers, used 1 barriers"""
    assert resources(log) == [("_Z1kv", "90", 128, 8, 20)]
