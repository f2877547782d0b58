"""Compiles csrc/ into one torch operator library, at wheel time or on first use.

Each source becomes an object cached under a hash of its text, the headers, the compiler's version and the flags; the
objects are linked into one library named by the hash of all of them. torch is located without importing it. The
library registers kernels only (schemas live in recon3d/ops), uses torch's stable ABI for 2.11 and newer, and carries
no Python symbol, so one file serves every Python and every later torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARY_NAME = "librecon3d.so"
CUDA_ARCHITECTURES = ("80", "90")
# torch 2.11: oldest release whose stable ABI has everything bind_*.cpp uses
_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
# -fno-math-errno: otherwise sqrt keeps loops from vectorising; contraction stays on so that clones use fma
_CXX_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
)
_NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v")


class BuildError(RuntimeError):
    """The compiled library could not be made; the torch reference stays in use."""


def sources_dir() -> Path:
    """The csrc folder: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    packaged = here / "csrc"
    return packaged if packaged.is_dir() else here.parent / "csrc"


def torch_dir() -> Path:
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed, so its headers are missing")
    return Path(spec.origin).parent


def compilers() -> tuple[str, str | None]:
    """The C++ compiler ($CXX, g++, clang++) and nvcc ($CUDA_HOME/bin, then the path; None without one)."""
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not cxx or shutil.which(cxx) is None:
        raise BuildError("no C++ compiler found (set CXX)")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    return cxx, nvcc or shutil.which("nvcc")


def cache_dir() -> Path:
    """Where objects and libraries are kept: $RECON3D_CACHE, else the user's cache folder, else a temporary one."""
    root = os.environ.get("RECON3D_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "recon3d"
    )
    path = Path(root)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError:  # read-only home: still build once per machine and user
        path = Path(tempfile.gettempdir()) / f"recon3d-{os.getuid()}"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise BuildError(f"cache folder {path} belongs to another user (set RECON3D_CACHE)") from None
    return path


def compile_library(csrc: Path, out: Path | None = None) -> Path:
    """Compile every source under csrc and link one library.

    Args:
        csrc: folder with cpu/*.cpp, cuda/*.cu, cuda/*.cpp and headers.
        out: where to copy the library; None leaves it in the cache.

    Returns:
        The path of the library.

    Raises:
        BuildError: no compiler, or a compile or link step failed (its output is the message).
    """
    cxx, nvcc = compilers()
    torch_root = torch_dir()
    version = _run([cxx, "--version"]).splitlines()[0] + (_run([nvcc, "--version"]) if nvcc else "")
    torch_version = importlib.metadata.version("torch")
    cache = cache_dir()

    def build(source: Path) -> Path:
        if source.suffix == ".cu":
            arch = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
            last = CUDA_ARCHITECTURES[-1]
            arch.append(f"-gencode=arch=compute_{last},code=compute_{last}")
            command = [str(nvcc), *_NVCC_FLAGS, *arch, f"-I{csrc}"]
        else:
            command = [cxx, *_CXX_FLAGS, _TARGET, f"-I{csrc}", f"-I{torch_root / 'include'}"]
        key = hashlib.sha256()
        for part in _with_headers(source, csrc):
            key.update(part.read_bytes())
        flags = " ".join(part for part in command if not part.startswith("-I"))  # the same in every checkout
        key.update(f"{version} {flags} {torch_version}".encode())
        obj = cache / f"{source.stem}-{key.hexdigest()[:16]}.o"
        if not obj.exists():
            _into(obj, lambda tmp: [*command, "-c", str(source), "-o", tmp])
        return obj

    sources = sorted(csrc.glob("cpu/*.cpp"))
    if nvcc:
        sources += sorted(csrc.glob("cuda/*.cu")) + sorted(csrc.glob("cuda/*.cpp"))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(build, sources))
    digest = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:16]
    library = cache / f"recon3d-{digest}.so"
    if not library.exists():
        lib = torch_root / "lib"
        # libtorch.so pulls in the CUDA half where there is one; kept although no symbol of it is used directly
        link = ["-L", str(lib), "-ltorch", "-ltorch_cpu", "-lc10"]
        if nvcc:
            head = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
        else:
            head = [cxx, "-shared", "-Wl,--no-as-needed"]
        _into(library, lambda tmp: [*head, *map(str, objects), *link, "-o", tmp])
    if out is None:
        return library
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(library, out)
    return out


def find_or_build() -> Path:
    """The library beside the package if a wheel brought one, else the cached one for these sources."""
    packaged = Path(__file__).resolve().parent / LIBRARY_NAME
    return packaged if packaged.exists() else compile_library(sources_dir())


def _with_headers(source: Path, csrc: Path) -> list[Path]:
    # the source and every header of ours it reaches; torch's own headers are covered by the target version
    found = [source]
    for file in found:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', file.read_text(), re.MULTILINE):
            for header in (file.parent / name, csrc / name):
                if header.is_file() and header.resolve() not in [f.resolve() for f in found]:
                    found.append(header)
    return found


def _into(path: Path, command: object) -> None:
    # written under a temporary name and renamed, so that parallel processes never load half a file
    handle, tmp = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=path.suffix)
    os.close(handle)
    try:
        log = _run(command(tmp))  # type: ignore[operator]
        os.replace(tmp, path)
        path.with_suffix(path.suffix + ".log").write_text(log)
    finally:
        if os.path.exists(tmp):
            os.unlink(tmp)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr
