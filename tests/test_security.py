"""Untrusted files run nothing and reach nothing: payloads that would leave a canary, and a scan of the source."""

import ast
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from recon3d.io import BadInput, describe, read_measurement, read_nifti

ROOT = Path(__file__).resolve().parents[1]
CANARY = "canary.txt"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder in which a payload that runs leaves the canary; checked when the test is over."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / CANARY).exists(), "a payload ran"


class Payload:
    """What pickle runs on loading."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def test_payload_works(tmp_path, monkeypatch):
    # the canary is real: unpickling leaves it
    monkeypatch.chdir(tmp_path)
    assert b"system" in pickletools.optimize(pickle.dumps(Payload()))
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / CANARY).exists()


def npy(values) -> bytes:
    out = io.BytesIO()
    np.save(out, values)
    return out.getvalue()


def npz(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return out.getvalue()


def header(text: str) -> bytes:
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def torch_file() -> bytes:
    out = io.BytesIO()
    torch.save({"sinogram": Payload()}, out)
    return out.getvalue()


def tar_file() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        info = tarfile.TarInfo(f"../{CANARY}")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    return out.getvalue()


OBJECTS = npy(np.array([Payload()], dtype=object))
GOOD = {"sinogram": npy(np.ones((4, 6), np.float32)), "angles_rad": npy(np.arange(4) * 0.5)}
MEASUREMENTS = {
    "pickle": pickle.dumps(Payload()),
    "pickle, protocol 0": pickle.dumps(Payload(), protocol=0),
    "npy of objects": OBJECTS,
    "npz, sinogram of objects": npz(**{**GOOD, "sinogram": OBJECTS}),
    "npz, angles of objects": npz(**{**GOOD, "angles_rad": OBJECTS}),
    "npz, type of objects": npz(**GOOD, type=OBJECTS),
    "npz, pickle as array": npz(**{**GOOD, "sinogram": pickle.dumps(Payload())}),
    "npz, header with a call": npz(**{**GOOD, "sinogram": header(f"__import__('os').system('touch {CANARY}')")}),
    "npz, shape with a call": npz(
        **{
            **GOOD,
            "sinogram": header(
                f"{{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('os').system('touch {CANARY}'),)}}"
            ),
        }
    ),
    "npz, object inside a record": npz(**{**GOOD, "sinogram": npy(np.array([(Payload(),)], dtype=[("a", "O")]))}),
    "npz, path outside": npz(**{**GOOD, f"../{CANARY}": GOOD["sinogram"], "sinogram": OBJECTS}),
    "torch file": torch_file(),
    "tar": tar_file(),
    "python": f"import os; os.system('touch {CANARY}')".encode(),
    "shell": f"#!/bin/sh\ntouch {CANARY}\n".encode(),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
@pytest.mark.parametrize("suffix", [".npz", ".h5", ".nii.gz"])
def test_measurement_payloads(folder, name, suffix):
    path = folder / f"payload{suffix}"
    path.write_bytes(MEASUREMENTS[name])
    for read in (lambda p: read_measurement(p, detector_spacing_mm=1.0), read_nifti, describe):
        try:
            read(path)
        except BadInput as error:
            assert "\n" not in str(error)
        else:
            # only describe may accept such a file, for what it does not touch
            assert read is describe
    assert not (folder.parent / CANARY).exists()


@pytest.mark.parametrize("name", [f"$(touch {CANARY}).h5", f"a; touch {CANARY};.h5", f"`touch {CANARY}`.h5", "-c.h5"])
def test_names_are_not_commands(folder, name):
    with h5py.File(folder / "a.h5", "w") as f:
        f["sinogram"], f["angles_deg"] = np.ones((4, 6)), np.arange(4) * 45.0
    (folder / "a.h5").rename(folder / name)
    assert read_measurement(name, detector_spacing_mm=1.0).sinogram.shape == (1, 4, 6)


def secret_file(folder: Path, kind: str) -> Path:
    """A sinogram that is to be taken from another file of the machine."""
    with h5py.File(folder / "secret.h5", "w") as f:
        f["sinogram"] = np.full((4, 6), 42.0)
    (folder / "secret.bin").write_bytes(np.full((4, 6), 42.0).tobytes())
    path = folder / "a.h5"
    with h5py.File(path, "w") as f:
        f["angles_deg"] = np.arange(4) * 45.0
        if kind == "external link":
            f["sinogram"] = h5py.ExternalLink("secret.h5", "/sinogram")
        elif kind == "external group":
            f["exchange"] = h5py.ExternalLink("secret.h5", "/")
        elif kind == "external storage":
            f.create_dataset("sinogram", (4, 6), "f8", external=[("secret.bin", 0, 192)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout((4, 6), "f8")
            layout[:] = h5py.VirtualSource("secret.h5", "sinogram", (4, 6))
            f.create_virtual_dataset("sinogram", layout)
        elif kind == "soft link through an external one":
            f["door"] = h5py.ExternalLink("secret.h5", "/")
            f["sinogram"] = h5py.SoftLink("/door/sinogram")
    return path


@pytest.mark.parametrize(
    "kind", ["external link", "external group", "external storage", "virtual", "soft link through an external one"]
)
def test_hdf5_reads_no_other_file(folder, kind):
    path = secret_file(folder, kind)
    with pytest.raises(BadInput):
        read_measurement(path, detector_spacing_mm=1.0)
    assert "42.0" not in json.dumps(describe(path))


def test_secret_would_be_read_without_the_guard(folder):
    # the payloads are real: h5py itself follows them
    for kind in ("external link", "external storage", "virtual", "soft link through an external one"):
        with h5py.File(secret_file(folder, kind)) as f:
            assert f["sinogram"][0, 0] == 42.0


YAML = {
    "apply": f"seed: !!python/object/apply:os.system ['touch {CANARY}']\n",
    "new": f"seed: !!python/object/new:os.system ['touch {CANARY}']\n",
    "name": "seed: !!python/name:os.system\n",
    "module": "seed: !!python/module:os\n",
    "tuple": f"? !!python/tuple [!!python/object/apply:os.system ['touch {CANARY}']]\n: 1\n",
    "own tag": "seed: !recon3d.run 1\n",
    "anchors": "a: &a [x, x]\nb: [*a, *a]\n",
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_payloads(folder, name):
    from recon3d.config import ConfigError, load_config

    (folder / "job.yaml").write_text(YAML[name])
    with pytest.raises(ConfigError):
        load_config(folder / "job.yaml")
    value = YAML[name].partition(": ")[2].strip()
    if "!" in value:
        with pytest.raises(ConfigError):
            load_config(overrides=[f"seed={value}"])
    with pytest.raises(ConfigError):
        load_config(overrides=[f"seed=__import__('os').system('touch {CANARY}')"])


def test_config_reads_files_alone(folder):
    from recon3d.config import ConfigError, load_config

    for path in ("/dev/zero", folder):
        with pytest.raises(ConfigError, match="not a file"):
            load_config(path)


@pytest.mark.parametrize("weights", [pickle.dumps(Payload()), torch_file()], ids=["pickle", "torch"])
def test_prior_payloads(folder, weights):
    import hashlib

    from recon3d.priors import find_prior, load_prior

    card = json.loads((find_prior("ct") / "card.json").read_text())
    card["sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / "prior").mkdir()
    (folder / "prior" / "card.json").write_text(json.dumps(card))
    (folder / "prior" / "model.safetensors").write_bytes(weights)
    with pytest.raises(BadInput, match="not a safetensors file"):
        load_prior(folder / "prior")
    card["architecture"] = {"family": f"__import__('os').system('touch {CANARY}')"}
    (folder / "prior" / "card.json").write_text(json.dumps(card))
    with pytest.raises(BadInput):
        load_prior(folder / "prior")


# ---- the source ------------------------------------------------------------------------------------------------

# what can turn data into code, and what can reach the network
FORBIDDEN_IMPORTS = {
    "pickle": "runs code on loading",
    "cPickle": "runs code on loading",
    "dill": "runs code on loading",
    "cloudpickle": "runs code on loading",
    "joblib": "runs code on loading",
    "shelve": "runs code on loading",
    "marshal": "loads code",
    "socket": "network",
    "ssl": "network",
    "urllib": "network",
    "http": "network",
    "ftplib": "network",
    "smtplib": "network",
    "requests": "network",
    "httpx": "network",
    "aiohttp": "network",
    "huggingface_hub": "network",
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {
    "os.system",
    "os.popen",
    "torch.hub.load",
    "torch.hub.load_state_dict_from_url",
    "torch.package.PackageImporter",
    "torch.jit.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "yaml.full_load_all",
    "yaml.unsafe_load_all",
    "importlib.machinery.SourceFileLoader",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(source: str, name: str = "source") -> list[str]:
    """Lines of a Python source that can run data or reach the network."""
    tree = ast.parse(source, name)
    # loaders that the module derives from the safe one
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader"} | {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and any(dotted(b).endswith("SafeLoader") for b in node.bases)
    }
    out = []

    def bad(node, why):
        out.append(f"{name}:{node.lineno}: {why}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] in FORBIDDEN_IMPORTS:
                    bad(node, f"imports {module} ({FORBIDDEN_IMPORTS[module.split('.')[0]]})")
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            given = {k.arg: k.value for k in node.keywords}
            if isinstance(node.func, ast.Name) and called in FORBIDDEN_CALLS:
                bad(node, f"calls {called}")
            if called in FORBIDDEN_METHODS:
                bad(node, f"calls {called}")
            if called == "yaml.load":
                loader = given.get("Loader") or (node.args[1] if len(node.args) > 1 else None)
                if loader is None or dotted(loader) not in safe:
                    bad(node, "calls yaml.load without a safe loader")
            if called == "torch.load":
                only = given.get("weights_only")
                if not (isinstance(only, ast.Constant) and only.value is True):
                    bad(node, "calls torch.load without weights_only=True")
            allow = given.get("allow_pickle")
            if allow is not None and not (isinstance(allow, ast.Constant) and allow.value is False):
                bad(node, "allows pickle")
            shell = given.get("shell")
            if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
                bad(node, "runs a shell")
    return out


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import urllib.request",
        "from http.client import HTTPConnection",
        "eval('1')",
        "exec('x = 1')",
        "__import__('os')",
        "import os; os.system('ls')",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "yaml.unsafe_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "subprocess.run('ls', shell=True)",
        "torch.hub.load('a/b', 'c')",
    ],
)
def test_scan_notices(line):
    assert offences(line)


@pytest.mark.parametrize(
    "line",
    [
        "model.eval()",
        "re.compile('a')",
        "torch.load(path, weights_only=True)",
        "class L(yaml.SafeLoader):\n    pass\nyaml.load(text, L)",
        "np.load(path, allow_pickle=False)",
        "# pickle.load",
    ],
)
def test_scan_lets_pass(line):
    assert not offences(line)


def sources() -> list[Path]:
    folders = ("recon3d", "kernels", "bench", "docs", "examples")
    return [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py"))]


def test_source_can_neither_run_data_nor_reach_the_network():
    files = sources()
    assert len(files) > 30
    found = [line for path in files for line in offences(path.read_text(), str(path.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_importing_opens_no_connection():
    code = (
        "import socket\n"
        "def no(*a, **k): raise SystemExit('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "import recon3d, recon3d.io, recon3d.ops, recon3d.metrics, recon3d.report, recon3d.priors\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
