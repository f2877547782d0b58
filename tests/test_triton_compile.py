"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, within its registers, and spills nothing.

A kernel module takes part by listing `VARIANTS` (recon3d.kernels.aot.Variant).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from recon3d.kernels import aot

NAMES = dict(aot.variants())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    # a process of its own, because interpreted kernels cannot be compiled, with a cache of its own
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-m", "recon3d.kernels.aot"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_resources(compiled, name, arch):
    found, variant = compiled[f"{name}:{arch}"], NAMES[name]
    assert "error" not in found, found["error"]
    assert found["spills"] == 0 and found["stack"] == 0, found
    assert found["registers"] <= variant.max_registers, found
    assert found["shared"] <= variant.max_shared, found
    assert found["load_bits"] >= variant.load_bits and found["store_bits"] >= variant.store_bits, found


def test_every_module_takes_part():
    modules = {p.stem for p in Path(aot.__file__).parent.glob("*.py")} - {"__init__", "aot"}
    assert modules == {name.split(":")[0] for name in NAMES}


def test_wrong_argument_names_are_refused():
    variant = next(iter(NAMES.values()))
    with pytest.raises(ValueError, match="missing or not the kernel's"):
        aot.compile_variant(aot.Variant("x", variant.kernel, {"nonsense": "i32"}), 90)
