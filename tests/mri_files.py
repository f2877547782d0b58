"""Makes small ISMRMRD, BART and twix files for tests, as scanners and converters write them."""

from __future__ import annotations

import h5py
import numpy as np

SPACE = """<{name}><matrixSize><x>{n[0]}</x><y>{n[1]}</y><z>{n[2]}</z></matrixSize>
<fieldOfView_mm><x>{f[0]}</x><y>{f[1]}</y><z>{f[2]}</z></fieldOfView_mm></{name}>"""

_IDX = [
    *[(n, "<u2") for n in ("kspace_encode_step_1", "kspace_encode_step_2", "average", "slice", "contrast", "phase")],
    *[(n, "<u2") for n in ("repetition", "set", "segment")],
    ("user", "<u2", (8,)),
]
HEAD = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("number_of_samples", "<u2"),
        ("available_channels", "<u2"),
        ("active_channels", "<u2"),
        ("channel_mask", "<u8", (16,)),
        ("discard_pre", "<u2"),
        ("discard_post", "<u2"),
        ("center_sample", "<u2"),
        ("encoding_space_ref", "<u2"),
        ("trajectory_dimensions", "<u2"),
        ("sample_time_us", "<f4"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("idx", _IDX),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
    ]
)
assert HEAD.itemsize == 340


def ismrmrd_header(
    encoded=(24, 20, 1),
    fov=(48.0, 30.0, 5.0),
    recon=(12, 20, 1),
    recon_fov=(24.0, 30.0, 5.0),
    centres=(10, 0),
    kind="cartesian",
    extra="",
    system="",
):
    limits = "".join(
        f"<kspace_encoding_step_{k + 1}><minimum>0</minimum><maximum>9</maximum><center>{c}</center>"
        f"</kspace_encoding_step_{k + 1}>"
        for k, c in enumerate(centres)
    )
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"<acquisitionSystemInformation>{system}</acquisitionSystemInformation><encoding>"
        + SPACE.format(name="encodedSpace", n=encoded, f=fov)
        + SPACE.format(name="reconSpace", n=recon, f=recon_fov)
        + f"<encodingLimits>{limits}</encodingLimits><trajectory>{kind}</trajectory>{extra}</encoding></ismrmrdHeader>"
    )


class Acquisitions:
    """Collects acquisitions and writes them."""

    def __init__(self):
        self.heads, self.traj, self.data = [], [], []

    def add(self, samples, traj=None, flags=(), position=None, directions=None, dwell=5.0, centre=None, **idx):
        """samples [coil, sample]; traj [sample, d]; directions: rows read, phase, slice in LPS."""
        head = np.zeros((), HEAD)
        head["version"] = 1
        head["number_of_samples"] = samples.shape[1]
        head["active_channels"] = head["available_channels"] = samples.shape[0]
        head["center_sample"] = samples.shape[1] // 2 if centre is None else centre
        head["sample_time_us"] = dwell
        head["trajectory_dimensions"] = 0 if traj is None else traj.shape[1]
        for flag in flags:
            head["flags"] |= np.uint64(1 << (flag - 1))
        if position is not None:
            head["position"] = position
        if directions is not None:
            head["read_dir"], head["phase_dir"], head["slice_dir"] = directions
        for name, value in idx.items():
            if name in dict.fromkeys(n[0] for n in _IDX):
                head["idx"][name] = value
            else:
                head[name] = value
        self.heads.append(head)
        self.traj.append(np.zeros(0, "f4") if traj is None else traj.astype("f4").reshape(-1))
        self.data.append(samples.astype(np.complex64).reshape(-1).view("f4"))
        return self

    def write(self, path, xml, group="dataset"):
        vlen = h5py.vlen_dtype(np.float32)
        row = np.dtype({"names": ["head", "traj", "data"], "formats": [HEAD, vlen, vlen], "offsets": [0, 340, 356]})
        table = np.empty(len(self.heads), row)
        for k, (head, traj, data) in enumerate(zip(self.heads, self.traj, self.data, strict=True)):
            table[k] = (head, traj, data)
        with h5py.File(path, "w") as f:
            g = f.create_group(group)
            g.create_dataset("xml", data=np.array([xml], dtype=object), dtype=h5py.string_dtype())
            g.create_dataset("data", data=table, maxshape=(None,), chunks=(1,))
        return path


def write_cfl(base, data, dims=None):
    """data [..., fastest last]; dims are those of BART, fastest first."""
    base.with_name(base.name + ".cfl").write_bytes(np.ascontiguousarray(data, np.complex64).tobytes())
    dims = dims or data.shape[::-1]
    text = "# Dimensions\n" + " ".join(map(str, [*dims, *[1] * (16 - len(dims))])) + " \n# Creator\nBART\n"
    base.with_name(base.name + ".hdr").write_text(text)
    return base.with_name(base.name + ".cfl")


PROTOCOL = """### ASCCONV BEGIN object=MrProtDataImpl ###
sKSpace.lBaseResolution\t = \t12
sKSpace.lPhaseEncodingLines\t = \t20
sKSpace.lPartitions\t = \t{partitions}
sKSpace.ucDimension\t = \t{dimension}
sKSpace.ucTrajectory\t = \t{trajectory}
sSliceArray.asSlice[0].dThickness\t = \t{thickness}
sSliceArray.asSlice[0].dPhaseFOV\t = \t30.0
sSliceArray.asSlice[0].dReadoutFOV\t = \t24.0
sRXSPEC.alDwellTime[0]\t = \t5000
### ASCCONV END ###
"""


def quaternion(directions):
    """(w, x, y, z) of the rotation whose columns are phase, read and slice directions."""
    m = np.stack([directions[1], directions[0], directions[2]], 1)
    w, x = 1 + np.trace(m), np.array([m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]])
    q = np.array([w, *x])
    return q / np.linalg.norm(q)


class Twix:
    """Collects lines and writes them as a scanner of VD (or VB) would; the last block ends the measurement."""

    def __init__(self, new=True, partitions=1, trajectory=1, thickness=5.0):
        self.new, self.measurements = new, []
        self.header = PROTOCOL.format(
            partitions=partitions, dimension=4 if partitions > 1 else 2, trajectory=trajectory, thickness=thickness
        )
        self.start()

    def start(self):
        """Another measurement."""
        self.measurements.append([])
        return self

    def add(self, samples, flags=(3,), line=0, partition=0, sli=0, ave=0, eco=0, position=(0, 0, 0), directions=None,
            centre=(10, 0)):  # fmt: skip
        from recon3d.io.twix import _VB, _VD

        kind = _VD if self.new else _VB
        head = np.zeros((), kind)
        coils, n = samples.shape
        head["samples"], head["coils"], head["centre_column"], head["centre"] = n, coils, n // 2, centre
        head["counters"] = [line, ave, sli, partition, eco, 0, 0, 0]
        head["position"] = position
        if directions is not None:
            head["quaternion"] = quaternion(directions)
        for flag in flags:
            head["mask"] |= np.uint64(1 << flag)
        each = [bytes(32) if self.new else head.tobytes() for _ in range(coils)]
        body = b"".join(h + s.astype("<c8").tobytes() for h, s in zip(each, samples, strict=True))
        head["length"] = kind.itemsize + len(body)
        self.measurements[-1].append((head.tobytes() if self.new else b"") + body)
        return self

    def block(self, flag, size):
        """Something that is not a line: synchronous data (5) or the end (0)."""
        from recon3d.io.twix import _VB, _VD

        head = np.zeros((), _VD if self.new else _VB)
        head["mask"], head["length"] = np.uint64(1 << flag), size
        self.measurements[-1].append(head.tobytes() + bytes(size - head.nbytes))
        return self

    def write(self, path):
        text = self.header.encode().ljust(12_000)  # headers of VB are longer than that
        name = b"MeasYaps\0" + len(text).to_bytes(4, "little") + text
        head = (8 + len(name)).to_bytes(4, "little") + (1).to_bytes(4, "little") + name
        bodies = []
        for lines in self.measurements:
            self.measurements[-1], keep = lines, self.measurements[-1]
            self.block(0, 192)
            bodies.append(head + b"".join(lines))
            lines.pop()
            self.measurements[-1] = keep
        if not self.new:
            path.write_bytes(bodies[-1])
            return path
        table = len(bodies).to_bytes(4, "little")
        out, at = bytes(4) + table, 10240
        for body in bodies:
            out += bytes(8) + at.to_bytes(8, "little") + len(body).to_bytes(8, "little") + bytes(128)
            at += len(body)
        path.write_bytes(out.ljust(10240, b"\0") + b"".join(bodies))
        return path
