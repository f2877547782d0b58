"""Ahead-of-time compilation of the Triton kernels, for a machine without a GPU: registers, stack and shared memory.

Every kernel module lists what its launchers would launch as `VARIANTS`; tests/test_triton_compile.py compiles each for
sm_80 and sm_90 through `python -m recon3d.kernels.aot` (a process of its own, as interpreted kernels cannot be
compiled) and holds it to its limits.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Attributes:
        name: unique within the module, such as "float32".
        kernel: the @triton.jit function.
        signature: type of every argument that is not constexpr, in Triton's words: "*fp32", "i64", "fp32", ...
        constexprs: value of every constexpr argument; None also stands for an absent pointer.
        max_registers: per thread; 255 is the hardware's limit, 64 keeps 1024 threads on an SM.
        max_shared: bytes per program.
        num_warps: as the launcher passes it.
        aligned: arguments that are multiples of 16 (pointers of torch tensors; sizes where the launcher knows).
        load_bits, store_bits: the widest global load and store must be at least this; 128 is a full vector.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    max_registers: int = 64
    max_shared: int = 0
    num_warps: int = 4
    aligned: tuple[str, ...] = ()
    load_bits: int = 0
    store_bits: int = 0


def variants() -> Iterator[tuple[str, Variant]]:
    """Every ("module:variant", Variant) of every kernel module."""
    package = importlib.import_module(__package__)
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if info.name != "aot":
            module = importlib.import_module(f"{__package__}.{info.name}")
            for variant in getattr(module, "VARIANTS", ()):
                yield f"{info.name}:{variant.name}", variant


def compile_variant(variant: Variant, arch: int) -> dict[str, int]:
    """Registers, stack, shared memory and spilled bytes of one variant; widest global load and store in bits."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    unknown = set(variant.signature) | set(variant.constexprs)
    if unknown != set(names):
        raise ValueError(f"{variant.name}: arguments {sorted(unknown ^ set(names))} are missing or not the kernel's")
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in variant.aligned}
    source = ASTSource(variant.kernel, signature, dict(variant.constexprs), attrs)
    options = {"num_warps": variant.num_warps, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _tool("cuobjdump", compiled.asm["cubin"], "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{variant.name}: no resource usage in {usage!r}")
    registers, stack, _, local = map(int, found.groups())
    code = _tool("cuobjdump", compiled.asm["cubin"], "-sass")
    return {
        "registers": registers,
        "stack": stack,
        "shared": int(compiled.metadata.shared),
        "spills": local + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "load_bits": _widest(code, "LDG"),
        "store_bits": _widest(code, "STG"),
    }


def _widest(code: str, instruction: str) -> int:
    found = re.findall(rf"\b{instruction}\.E([.\w]*)", code)
    wide = [int(m.group(1)) for s in found if (m := re.search(r"\.(64|128|256)\b", s))]
    return max(wide, default=32 if found else 0)


def _tool(name: str, binary: bytes, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    path = Path(nvidia.__file__).parent / "bin" / name  # rides in the Triton wheel
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary)
        done = subprocess.run([str(path), *arguments, str(cubin)], capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    """Compile everything and write one JSON object {"module:variant:arch": resources or error} to stdout."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("recon3d.kernels.aot: unset TRITON_INTERPRET, interpreted kernels cannot be compiled")
    jobs = [(name, arch) for name, _ in variants() for arch in ARCHITECTURES]
    with ProcessPoolExecutor() as pool:
        results = {f"{n}:{a}": found for (n, a), found in zip(jobs, pool.map(_measure, jobs), strict=True)}
    json.dump(results, sys.stdout, indent=1)


def _measure(job: tuple[str, int]) -> dict[str, Any]:
    name, arch = job
    try:
        return compile_variant(dict(variants())[name], arch)
    except Exception as error:  # one kernel's failure must not hide the others
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main()
