"""What an import costs and where the kernels come from, in fresh interpreters."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str, **env: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    loaded = _python(
        "import sys, recon3d; print(sorted(m for m in sys.modules if m in ('torch', 'triton', 'matplotlib')))"
    )
    assert loaded == "[]"


def test_kernels_folder_is_reached_through_the_package():
    assert _python("import recon3d.kernels as k; print(len(list(k.__path__)))") == "2"
    code = "import importlib.util as u; print(u.find_spec('recon3d.kernels.renoise').origin)"
    assert _python(code) == str(ROOT / "kernels" / "renoise.py")


def test_without_a_compiler_the_reference_runs(tmp_path):
    code = (
        "import torch; from recon3d.ops import dot, _library; "
        "print(float(dot(torch.ones(1, 3), torch.ones(1, 3))), _library.ensure(), _library.build_error())"
    )
    env = {
        "PATH": str(tmp_path),
        "RECON3D_CACHE": str(tmp_path / "cache"),
        "RECON3D_BUILD": "0",
        "CXX": "",
        "CUDA_HOME": "",
    }
    assert _python(code, **env) == "3.0 False no C++ compiler found (set CXX)"


def test_a_demanded_build_that_fails_is_an_error(tmp_path):
    code = (
        "import torch\nfrom recon3d import _build\nfrom recon3d.ops import dot\n"
        "try: dot(torch.ones(1), torch.ones(1))\nexcept _build.BuildError as e: print(e)"
    )
    env = {"PATH": str(tmp_path), "RECON3D_CACHE": str(tmp_path / "cache"), "RECON3D_BUILD": "1", "CXX": ""}
    assert _python(code, **env) == "no C++ compiler found (set CXX)"


def test_reference_switch():
    code = "from recon3d.ops import _library; print(_library.ensure(), _library.build_error())"
    assert _python(code, RECON3D_BACKEND="reference") == "False RECON3D_BACKEND=reference"
