"""PETSIRD: crystals land where their boxes are, and events in the bins of their crystals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from petsird_files import random_events, write_petsird

from recon3d.geometry import TOF, PETScanner, scanner
from recon3d.io import BadInput, describe, read_pet

petsird = pytest.importorskip("petsird")

CAMERA = PETScanner("camera", 6, 4.0, 60, 90.0, 10, 6, (9,), (), 30)
TURNED = PETScanner("camera", 4, 5.0, 48, 80.0, 6, 4, (), (), 24, math.radians(2.5))
TIMES = TOF(5, 30.0, 15.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.petsird"


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("device", [CAMERA, TURNED], ids=["gaps", "turned"])
def test_scanner_is_found_again(path, device, flat):
    events = random_events(device, 50)
    write_petsird(path, device, events, flat=flat)
    found = read_pet(path).geometry.scanner
    for name in ("rings", "crystals", "block_crystals", "gap_crystals"):
        assert getattr(found, name) == getattr(device, name)
    assert found.ring_spacing_mm == pytest.approx(device.ring_spacing_mm, rel=1e-5)
    assert found.radius_mm == pytest.approx(device.radius_mm, rel=0.06 if flat else 1e-5)
    if not flat:
        # the same set of places, and each event between the same two
        mine, theirs = found.crystal_positions(), device.crystal_positions()
        real = device.real_crystals().reshape(-1)
        gap = np.abs(theirs[real][:, None] - mine[None]).sum(-1).min(1)
        assert gap.max() < 5e-3


@pytest.mark.parametrize("energies", [1, 3])
def test_events_are_those_written(path, energies):
    events, delayed = random_events(CAMERA, 400, TIMES), random_events(CAMERA, 100, TIMES, seed=1)
    write_petsird(path, CAMERA, events, delayed, TIMES, energies=energies)
    found = read_pet(path)
    place = found.geometry.scanner.crystal_positions()
    theirs = CAMERA.crystal_positions()
    prompt = found.events.prompt.numpy()
    for kind, written in ((prompt, events), (~prompt, delayed)):
        pairs = found.events.pairs.numpy()[kind]
        assert np.allclose(place[pairs], theirs[written[:, :2]], atol=5e-3)
        assert found.events.tof_bins.numpy()[kind].tolist() == written[:, 2].tolist()
        assert found.events.time_ms.numpy()[kind].tolist() == (written[:, 3] // 10 * 10).tolist()
    assert found.geometry.tof.bins == 5 and found.geometry.tof.bin_mm == pytest.approx(30.0)
    assert found.geometry.tof.sigma_mm == pytest.approx(15.0)
    a, b = found.events.histogram(found.geometry)
    assert torch.equal(a, found.prompts) and torch.equal(b, found.delayed)
    assert found.info.duration_s == pytest.approx(0.04)


def test_seconds_and_compression(path):
    write_petsird(path, CAMERA, random_events(CAMERA, 300))
    part = read_pet(path, seconds=(0.01, 0.02), max_ring_difference=1, mashing=2)
    assert set(part.events.time_ms.tolist()) == {10} and part.geometry.max_ring_difference == 1
    assert part.prompts.shape == (15, part.geometry.n_radial, 16)
    assert read_pet(path, histogram=False).prompts.numel() == 0


def test_large_indices(path):
    """Crystals of a real scanner take two and three bytes each."""
    device = scanner("mmr")
    events = random_events(device, 200)
    write_petsird(path, device, events)
    found = read_pet(path, histogram=False)
    place = found.geometry.scanner.crystal_positions()
    assert np.allclose(place[found.events.pairs.numpy()], device.crystal_positions()[events[:, :2]], atol=5e-3)
    assert describe(path)["crystals_of_a_ring"] == 504


def test_what_cannot_be_read_is_told(path):
    events = random_events(CAMERA, 50)

    def refuse(match, **kwargs):
        write_petsird(path, CAMERA, kwargs.pop("events", events), **kwargs)
        with pytest.raises(BadInput, match=match) as error:
            read_pet(path)
        assert "\n" not in str(error.value)

    def two_types(header):
        geometry = header.scanner.scanner_geometry
        geometry.replicated_modules.append(geometry.replicated_modules[0])

    def two_layers(header):
        elements = header.scanner.scanner_geometry.replicated_modules[0].object.detecting_elements
        elements.transforms += [petsird.RigidTransformation(matrix=t.matrix) for t in elements.transforms]

    def uneven_time(header):
        header.scanner.tof_bin_edges[0][0].edges = np.array([-90, -30, 10, 30, 90], np.float32)

    def shifted(header):
        matrices = [t.matrix for t in header.scanner.scanner_geometry.replicated_modules[0].transforms]
        for k, m in enumerate(matrices):
            m[0, 3] += 40 * (k % 2)

    bed = petsird.TimeBlock.BedMovementTimeBlock(petsird.BedMovementTimeBlock())
    refuse("2 types", head=two_types)
    refuse("one place", head=two_layers)
    refuse("one width", head=uneven_time, tof=TOF(4, 40.0, 20.0))
    refuse("cylinder|spread|alike", head=shifted)
    refuse("moves", extra=[bed])
    refuse("no prompt", events=events[:0], delayed=events)


def test_damage_is_told(path):
    write_petsird(path, CAMERA, random_events(CAMERA, 300))
    raw = path.read_bytes()
    for cut in (7, 60, len(raw) // 2, len(raw) - 5):
        path.write_bytes(raw[:cut])
        with pytest.raises(BadInput):
            read_pet(path)
    path.write_bytes(raw[:9] + b"\xff" * 200_000)
    with pytest.raises(BadInput, match="ten bytes"):
        read_pet(path)
