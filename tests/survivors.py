"""Jobs that are killed. Runs in a process of its own: it imports torch once and forks each attempt, before any thread
exists, so an attempt costs milliseconds instead of an import.

    python tests/survivors.py kills FOLDER [COUNT ct|mri|pet|several]   -> JSON on stdout
    python tests/survivors.py signals FOLDER
    python tests/survivors.py memory FOLDER RECIPE
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import h5py  # noqa: F401 - imported here, or every child would
import nibabel  # noqa: F401
import torch
from mri_jobs import mri_reconstruction
from pet_jobs import pet_reconstruction

import recon3d.metrics  # noqa: F401
from recon3d.api import reconstruct
from recon3d.cli import run as command
from recon3d.config import OutputConfig
from recon3d.engine.job import Schedule
from recon3d.geometry import ParallelBeam, VolumeGrid, equiangular
from recon3d.operators.noise import PoissonNoise
from recon3d.priors.gaussian import GaussianPrior, power_law
from recon3d.recipes import Recipe

GRID = VolumeGrid((6, 32, 32), (2.0, 3.0, 3.0))
SCAN = ParallelBeam(equiangular(10), 48, 3.0)
MU = 0.0193
# noise, conjugate gradients and total variation along z, with duals in the checkpoint
RECIPE = {
    "name": "survivor",
    "start": {"image": "pinv"},
    "trajectory": {"grid": "karras", "levels": 24},
    "consistency": {"kind": "proximal_cg", "iterations": 2, "rho_rule": "relative", "rho": 0.05},
    "regulariser": {"kind": "tvz"},
    "renoise": {"kind": "ddim", "eta": 0.85},
    "noise": {"kind": "iscs_mm", "correlation_mm": 6.0},
}


def prior():
    return GaussianPrior(power_law(GRID.slice_shape, 0.3 * MU), MU / 2, offset=MU, scale=MU)


def sinogram():
    generator = torch.Generator().manual_seed(3)
    from recon3d.operators import CTOperator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clean = CTOperator(SCAN, GRID)(torch.rand(GRID.shape, generator=generator) * MU)
    return PoissonNoise(1e5).simulate(clean, 1)


def reconstruction(folder, **settings):
    return reconstruct(
        sinogram(), SCAN, GRID, Recipe.model_validate(RECIPE), prior(), noise=PoissonNoise(1e5), seed=11, folder=folder,
        device="cpu", **settings,
    )  # fmt: skip


def several(folder, **settings):
    return reconstruction(folder, samples=3, **settings)


def fork(work):
    """Run `work` in a child that takes its exit code; gives the child's pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        code = work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 99
    os._exit(int(code or 0))


def finish(pid):
    """The exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def attempt(folder, job="ct"):
    def work():
        jobs = {"ct": reconstruction, "mri": mri_reconstruction, "pet": pet_reconstruction, "several": several}
        run = jobs[job]
        # one thread: on a busy machine two wait for each other more than they compute
        torch.set_num_threads(1)
        run(folder, workers=1, schedule=Schedule(every_levels=1), output=OutputConfig(preview=False))

    return fork(work)


def tiny_prior(folder):
    """A packaged-style prior: a U-Net of a few thousand weights."""
    from recon3d.priors import ModelCard
    from recon3d.priors.checkpoints import write_folder
    from recon3d.priors.networks import UNet, UNetConfig

    torch.manual_seed(5)
    config = UNetConfig(channels=(8, 16), blocks=1, embedding=16, group_size=8)
    net = UNet(config)
    with torch.no_grad():
        for weight in net.parameters():  # as built it answers zero
            weight.add_(0.02 * torch.randn(weight.shape))
    card = ModelCard(
        name="tiny", offset=MU, scale=MU, sigma_data=0.5, architecture={"family": "unet", **config.model_dump()}
    )
    write_folder(folder, card, net.state_dict())
    return folder


def scan_file(path):
    """A sinogram of the job above, as a file."""
    from recon3d.io import Measurement, write_measurement

    write_measurement(path, Measurement(sinogram(), SCAN, GRID, 1e5, "recon3d"))
    return path


def job_file(root: Path, **changes):
    """A job on files: sinogram, prior and recipe as above."""
    import yaml

    root.mkdir(parents=True, exist_ok=True)
    job = {"input": {"path": str(scan_file(root / "scan.h5"))}, "prior": str(tiny_prior(root / "prior")), "seed": 11,
           "recipe": RECIPE, "compute": {"device": "cpu", "workers": 1}, "output": {"preview": False}}  # fmt: skip
    (root / "job.yaml").write_text(yaml.safe_dump(job | changes))
    return root / "job.yaml"


def digest(folder):
    return json.loads((folder / "manifest.json").read_text())["volume_sha256"]


def kills(root: Path, count: int | str = 20, job: str = "ct") -> dict:
    """One undisturbed run; then runs killed at random moments, each finished in the end.

    Until `count` kills have landed and some run went on from a checkpoint; few kills may all come before the first one.
    """
    count, start = int(count), time.perf_counter()
    assert finish(attempt(root / "calm", job)) == 0
    length = time.perf_counter() - start
    wanted = digest(root / "calm")
    rng = random.Random(int.from_bytes(os.urandom(4), "little"))
    landed, at_level, runs, attempts = 0, [], 0, []
    while landed < count or (max(attempts) < 2 and landed < count + 40):
        folder = root / f"run{runs}"
        runs += 1
        late = False
        for turn in range(40):
            pid = attempt(folder, job)
            if (landed < count or max([1, *attempts]) < 2) and turn < 8:
                time.sleep(rng.uniform(0, length))
                os.kill(pid, signal.SIGKILL)
            code = finish(pid)
            if code == 0:
                break
            assert code == -signal.SIGKILL, code
            landed += 1
            at_level.append(level(folder))
            late = (folder / "manifest.json").exists()
            if late:  # the run was whole already; only its checkpoint may not be tidied away yet
                break
        manifest = json.loads((folder / "manifest.json").read_text())
        assert digest(folder) == wanted, f"run {runs} differs after {landed} kills"
        attempts.append(manifest["attempts"])
        left = sorted(p.name for p in folder.iterdir())
        assert not [n for n in left if "tmp" in n or (n == "checkpoint" and not late)], left
    return {"kills": landed, "runs": runs, "levels": at_level, "attempts": attempts, "seconds": length}


def level(folder: Path) -> int:
    """Level of the folder's checkpoint, -1 without one."""
    try:
        return json.loads((folder / "checkpoint" / "LATEST.json").read_text())["meta"]["index"]
    except FileNotFoundError:
        return -1


def signals(root: Path) -> dict:
    """SIGTERM and SIGINT at random moments: exit 130 within seconds, then resume, to the same bits."""
    # in a child as well: OpenMP's threads do not survive a fork
    assert finish(fork(lambda: job_file(root / "in") and None)) == 0
    job = root / "in" / "job.yaml"
    levels = "recipe.trajectory.levels=40"

    def recon(folder):
        return fork(lambda: command(["recon", "-c", str(job), "-s", levels, "-o", str(folder), "-q"]))

    start = time.perf_counter()
    assert finish(recon(root / "calm")) == 0
    length = time.perf_counter() - start
    wanted, delays, codes, rng = digest(root / "calm"), [], [], random.Random(2)
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = root / f"stopped{len(codes)}"
        pid = recon(folder)
        while not (folder / "checkpoint" / "LATEST.json").exists():
            time.sleep(0.01)  # a signal before there is a run ends the process like any other
        time.sleep(rng.uniform(0, length / 6))
        asked = time.perf_counter()
        os.kill(pid, number)
        codes.append(finish(pid))
        delays.append(time.perf_counter() - asked)
        if codes[-1] == 130:
            assert not (folder / "manifest.json").exists()
            assert finish(fork(lambda folder=folder: command(["resume", str(folder), "-q"]))) == 0
        assert digest(folder) == wanted, f"{folder} differs"
    return {"codes": codes, "delays": delays, "seconds": length}


def memory(root: Path, recipe: str) -> dict:
    """Predicted and observed peak of a job whose volumes are a good part of its memory."""
    from recon3d.engine.memory import peak_resident_bytes, tame_allocator
    from recon3d.recipes import load_recipe

    tame_allocator()
    grid, scan = VolumeGrid((64, 224, 224), (2.0, 1.0, 1.0)), ParallelBeam(equiangular(60), 320, 1.0)
    y = torch.rand(64, 60, 320, generator=torch.Generator().manual_seed(0))
    events: list[dict] = []
    method = load_recipe(recipe, {"trajectory.levels": 2})
    reconstruct(
        y, scan, grid, method, tiny_prior(root / "prior"), noise=PoissonNoise(1e5), device="cpu", workers=2,
        listeners=(events.append,), accept_mismatch=True,
    )  # fmt: skip
    told = next(e for e in events if e["event"] == "plan")
    before = told["parts_bytes"]["process with data and prior"]
    return {"predicted": told["host_bytes"], "observed": peak_resident_bytes(), "before": before}


if __name__ == "__main__":
    scenario, place = sys.argv[1], Path(sys.argv[2])
    print(json.dumps({"kills": kills, "signals": signals, "memory": memory}[scenario](place, *sys.argv[3:])))
