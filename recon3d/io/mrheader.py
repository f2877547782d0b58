"""The XML header of ISMRMRD and fastMRI files: matrix, field of view, limits, and how coils were calibrated.

Parsed by expat without document types, so that nothing is expanded or fetched, with a cap on depth and on elements.
Format: Inati et al., Magnetic Resonance in Medicine 77 (2017) 411.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from recon3d.io.guard import BadInput, as_bad_input
from recon3d.io.kspace import KSpaceOptions, spacing_or_nominal

_MOST_CHARACTERS = 4 << 20
_MOST_ELEMENTS = 100_000
_DEEPEST = 32
_MOST_SIZE = 1 << 16
_MOST_FOV_MM = 1e5


@dataclass(frozen=True)
class MRSpace:
    """Matrix and field of view of the encoded or the reconstructed space, along readout, phase and partition."""

    matrix: tuple[int, int, int]
    fov_mm: tuple[float, float, float]

    def pixel_mm(self, axis: int) -> float:
        """Size of a pixel along an axis; 0 when the field of view is not recorded."""
        return self.fov_mm[axis] / self.matrix[axis]


@dataclass(frozen=True)
class MRHeader:
    """What the header says, checked.

    Attributes:
        encoded: what was measured, with oversampling.
        recon: what the scanner would show.
        centres: index of the centre of k-space for `kspace_encoding_step_1` and `_2`, where stated.
        trajectory: "cartesian", "radial" and so on.
        calibration: "embedded", "separate" and so on; empty when not stated.
        noise_bandwidth: relative receiver bandwidth of the noise scan; 1 when not stated.
        vendor: of the scanner; empty when not stated.
        description: vendor, model, field strength, in words.
        encodings: how many encoding spaces the file has; the first is described.
    """

    encoded: MRSpace
    recon: MRSpace
    centres: dict[str, int]
    trajectory: str
    calibration: str
    noise_bandwidth: float
    vendor: str
    description: str
    encodings: int

    @property
    def nominal(self) -> bool:
        """Whether the field of view was made up: equal to the matrix, a pixel of 1 mm."""
        return all(float(n) == f for n, f in zip(self.encoded.matrix, self.encoded.fov_mm, strict=True))

    def pixel_mm(
        self, path: str | os.PathLike[str], sizes: tuple[int, int], options: KSpaceOptions, notes: list[str]
    ) -> tuple[float, float]:
        """Pixel sizes along readout and phase for an encoded field of view of so many pixels."""
        if options.pixel_mm is not None:
            return options.pixel_mm
        if self.nominal:
            notes.append("the field of view equals the matrix, so it is nominal: pixels are not truly 1 mm")
        names = ("the field of view of the readout", "the field of view of the phase encoding")
        out = []
        for k, name in enumerate(names):
            size = self.encoded.fov_mm[k] / sizes[k]
            out.append(spacing_or_nominal(path, name, size, notes))
        return out[0], out[1]

    def slice_step_mm(self, path: str | os.PathLike[str], options: KSpaceOptions, notes: list[str]) -> float:
        """Thickness of a slice, or of a partition."""
        if options.slice_spacing_mm is not None:
            return options.slice_spacing_mm
        thickness = self.encoded.fov_mm[2] / self.encoded.matrix[2]
        return spacing_or_nominal(path, "the thickness of a slice", thickness, notes)


def parse_header(path: str | os.PathLike[str], text: str) -> MRHeader:
    """The header of the first encoding.

    Raises:
        BadInput: it is not such a header, not well formed, or holds absurd numbers.
    """
    root = _parse(path, text)
    if root.tag != "ismrmrdHeader":
        raise BadInput(path, f"has a header that begins with {root.tag[:40]!r}", "an ISMRMRD header is expected")
    encodings = root.findall("encoding")
    if not encodings:
        raise BadInput(path, "has a header without encoding", "export it again")
    encoding = encodings[0]
    encoded = _space(path, encoding, "encodedSpace")
    recon = _space(path, encoding, "reconSpace") if encoding.find("reconSpace") is not None else encoded
    centres = {}
    for name in ("kspace_encoding_step_1", "kspace_encoding_step_2"):
        found = encoding.findtext(f"encodingLimits/{name}/center")
        if found is not None:
            centres[name] = _whole(path, f"the centre of {name}", found, 0)
    system = "acquisitionSystemInformation"
    words = [root.findtext(f"{system}/{name}") for name in ("systemVendor", "systemModel", "systemFieldStrength_T")]
    bandwidth = root.findtext(f"{system}/relativeReceiverNoiseBandwidth")
    relative = _real(path, "relativeReceiverNoiseBandwidth", bandwidth, 1e-3, 1e3) if bandwidth else 1.0
    return MRHeader(
        encoded,
        recon,
        centres,
        (encoding.findtext("trajectory") or "cartesian").strip().lower()[:40],
        (encoding.findtext("parallelImaging/calibrationMode") or "").strip().lower()[:40],
        relative,
        (words[0] or "").strip()[:60],
        " ".join(w.strip()[:60] for w in words if w and w.strip()),
        len(encodings),
    )


class _Builder(ElementTree.TreeBuilder):
    """Builds the tree without namespaces, and stops where a header would never go."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = self._count = 0

    def start(self, tag: str, attrs: dict[str, str]) -> Element:
        self._depth += 1
        self._count += 1
        if self._depth > _DEEPEST or self._count > _MOST_ELEMENTS:
            raise ValueError(f"more than {_DEEPEST} levels or {_MOST_ELEMENTS} elements")
        return super().start(tag.rpartition("}")[2], {})

    def end(self, tag: str) -> Element:
        self._depth -= 1
        return super().end(tag.rpartition("}")[2])

    def doctype(self, *_: object) -> None:
        raise ValueError("it declares a document type")


def _parse(path: str | os.PathLike[str], text: str) -> Element:
    if len(text) > _MOST_CHARACTERS:
        raise BadInput(path, f"has a header of {len(text)} characters", f"at most {_MOST_CHARACTERS} are read")
    # h5py pads texts of fixed length
    text = text.strip("\0 \t\r\n")
    broken = (ElementTree.ParseError, ValueError, LookupError, RecursionError, TypeError, AssertionError)
    with as_bad_input(path, "has a header that is not usable XML", broken):
        parser = ElementTree.XMLParser(target=_Builder())
        parser.feed(text.encode("utf-8", "replace"))
        root = parser.close()
        if not isinstance(root, Element):
            raise ValueError("it is empty")
        return root


def _space(path: str | os.PathLike[str], encoding: Element, name: str) -> MRSpace:
    matrix, fov = [], []
    for axis in "xyz":
        size = encoding.findtext(f"{name}/matrixSize/{axis}")
        if size is None:
            raise BadInput(path, f"has a header without {name}/matrixSize/{axis}", "export it again")
        matrix.append(_whole(path, f"{name}/matrixSize/{axis}", size, 1))
        length = encoding.findtext(f"{name}/fieldOfView_mm/{axis}")
        fov.append(_real(path, f"{name}/fieldOfView_mm/{axis}", length or "0", 0.0, _MOST_FOV_MM))
    return MRSpace((matrix[0], matrix[1], matrix[2]), (fov[0], fov[1], fov[2]))


def _whole(path: str | os.PathLike[str], name: str, text: str, least: int) -> int:
    try:
        value = int(text.strip()[:12])
    except ValueError:
        value = -1
    if not least <= value <= _MOST_SIZE:
        raise BadInput(path, f"says {name} = {text.strip()[:30]!r}", f"{least} to {_MOST_SIZE} is allowed")
    return value


def _real(path: str | os.PathLike[str], name: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text.strip()[:40])
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(path, f"says {name} = {text.strip()[:30]!r}", f"{low:g} to {high:g} is allowed")
    return value
