"""PETSIRD files of a cylindrical scanner, written with the petsird package."""

from __future__ import annotations

import math

import numpy as np

DEPTH = 20.0


def write_petsird(
    path, device, prompts, delayed=(), tof=None, flat=False, energies=1, name="camera", block_ms=10, extra=(), head=None
):
    """Events [n, 3 or 4] of (crystal of p0, crystal of p1, time bin, ms) on the crystals of a PETScanner.

    Modules are the scanner's blocks around the ring, as long as the scanner; the elements of a module run around, then
    along z. `flat` puts them on a plane as real blocks have them.
    """
    import petsird
    from petsird.helpers.create import initialize_scanner_information_dimensions

    around = [k for k in range(device.block_crystals) if k not in device.gap_crystals]
    step = 2 * math.pi / device.crystals
    inner = device.radius_mm - 7.0
    middle = (around[0] + around[-1]) / 2
    half = device.ring_spacing_mm / 2.2
    corners = [(a, b, c) for a in (0.0, DEPTH) for b in (-1.0, 1.0) for c in (-half, half)]
    box = petsird.BoxSolidVolume(
        shape=petsird.BoxShape(corners=[petsird.Coordinate(c=np.array(c, np.float32)) for c in corners]), material_id=1
    )
    elements = petsird.ReplicatedBoxSolidVolume(object=box)
    for k in around:
        for z in device.ring_z_mm():
            turn = (k - middle) * step
            if flat:
                m = [[1, 0, 0, inner], [0, 1, 0, device.radius_mm * math.tan(turn)], [0, 0, 1, z]]
            else:
                c, s = math.cos(turn), math.sin(turn)
                m = [[c, -s, 0, inner * c], [s, c, 0, inner * s], [0, 0, 1, z]]
            elements.transforms.append(petsird.RigidTransformation(matrix=np.array(m, np.float32)))
    module = petsird.ReplicatedDetectorModule(object=petsird.DetectorModule(detecting_elements=elements))
    blocks = device.crystals // device.block_crystals
    for b in range(blocks):
        # psi = 0 is above the patient, at y < 0, and grows towards x
        psi = (b * device.block_crystals + middle) * step + device.tilt_rad
        c, s = math.cos(psi - math.pi / 2), math.sin(psi - math.pi / 2)
        matrix = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0]], np.float32)
        module.transforms.append(petsird.RigidTransformation(matrix=matrix))
    scanner = petsird.ScannerInformation(
        model_name=name, scanner_geometry=petsird.ScannerGeometry(replicated_modules=[module])
    )
    initialize_scanner_information_dimensions(scanner, 1, False, False)
    bins = 1 if tof is None else tof.bins
    width = 300.0 if tof is None else tof.bin_mm
    edges = (np.arange(bins + 1) - bins / 2) * width
    scanner.tof_bin_edges[0][0] = petsird.BinEdges(edges=edges.astype(np.float32))
    scanner.tof_resolution[0][0] = 300.0 if tof is None else tof.sigma_mm * 2 * math.sqrt(2 * math.log(2))
    scanner.event_energy_bin_edges[0] = petsird.BinEdges(edges=np.linspace(430, 610, energies + 1, dtype=np.float32))
    scanner.energy_resolution_at_511 = [0.1]
    place = {k: i for i, k in enumerate(around)}
    each = len(around) * device.rings

    def detection(crystal, energy):
        ring, c = divmod(int(crystal), device.crystals)
        block, k = divmod(c, device.block_crystals)
        return (block * each + place[k] * device.rings + ring) * energies + energy

    def rows(events, start):
        out = []
        for a, b, t, ms in events:
            if start <= ms < start + block_ms:
                pair = [detection(a, len(out) % energies), detection(b, 0)]
                out.append(petsird.CoincidenceEvent(detection_bins=pair, tof_idx=int(t)))
        return out

    last = max((int(e[3]) for e in [*prompts, *delayed]), default=0)
    blocks_of_time = [
        petsird.TimeBlock.EventTimeBlock(
            petsird.EventTimeBlock(
                time_interval=petsird.TimeInterval(start=ms, stop=ms + block_ms),
                prompt_events=[[rows(prompts, ms)]],
                delayed_events=[[rows(delayed, ms)]],
            )
        )
        for ms in range(0, last + 1, block_ms)
    ]
    header = petsird.Header(scanner=scanner, exam=None)
    if head is not None:
        head(header)
    with petsird.BinaryPETSIRDWriter(str(path)) as writer:
        writer.write_header(header)
        writer.write_time_blocks([*blocks_of_time, *extra])


def random_events(device, n, tof=None, seed=0, spread_ms=35):
    """Pairs of crystals that exist, seen across the field of view, in the order of their times."""
    rng = np.random.default_rng(seed)
    real = np.flatnonzero(device.real_crystals().reshape(-1))
    a = rng.choice(real, n)
    half = device.crystals // 2
    across = (a + half + rng.integers(-half // 2, half // 2, n)) % device.crystals
    b = rng.permutation(device.rings)[a // device.crystals] * device.crystals + across
    keep = np.isin(b, real)
    t = rng.integers(0, 1 if tof is None else tof.bins, n)
    return np.stack([a, b, t, np.sort(rng.integers(0, spread_ms, n))], -1)[keep]
