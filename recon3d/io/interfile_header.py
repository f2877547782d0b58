"""The text half of an Interfile pair: `key := value` lines, as STIR and Siemens write them.

Keys are compared without case, without a leading `!` and with `_` as a blank; `key [3]` carries an index; `;` begins a
comment. A key that appears twice with different values is refused when it is asked for, not guessed at. Formats: STIR's
user guide, section Interfile; the PETLINK guideline of Siemens.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from recon3d.io.guard import BadInput, check_file, check_scaling

_MOST_HEADER = 4 << 20
_MOST_NUMBERS = 1 << 14
_MOST_LINE = 1 << 20
_START = re.compile(rb"[\s\xef\xbb\xbf]*!?\s*INTERFILE\s*:=", re.IGNORECASE)
_KEY = re.compile(r"^(.{1,200}?)\s*:=\s*(.*)$")
_INDEX = re.compile(r"^(.*?)\s*\[\s*(\d{1,6})\s*\]$")
_WHOLE = re.compile(r"^[+-]?\d{1,12}$")
# number format -> kind of numpy type; sizes allowed
_FORMATS = {
    "float": ("f", (4, 8)),
    "short float": ("f", (4,)),
    "long float": ("f", (8,)),
    "signed integer": ("i", (1, 2, 4)),
    "unsigned integer": ("u", (1, 2, 4)),
}
_ORDERS = {"littleendian": "<", "bigendian": ">"}


@dataclass(frozen=True)
class InterfileHeader:
    """Keys and values of a header, asked for by name.

    Attributes:
        path: the header's file.
        values: (key, index or 0) -> text.
        clashes: keys that appear with more than one value.
    """

    path: Path
    values: dict[tuple[str, int], str]
    clashes: frozenset[tuple[str, int]]

    @property
    def is_siemens(self) -> bool:
        """Whether the keys are those of Siemens rather than of STIR."""
        return ("%sms-mi header name space", 0) in self.values or ("%sms-mi version number", 0) in self.values

    def text(self, *keys: str, index: int = 0) -> str | None:
        """The value of the first of several spellings of a key that is there and not empty.

        Raises:
            BadInput: it is there twice, with different values.
        """
        for key in keys:
            value = self.values.get((key, index))
            if (key, index) in self.clashes:
                raise BadInput(self.path, f"says {self._name(key, index)} twice, differently", "delete the wrong line")
            if value:
                return value
        return None

    def whole(self, *keys: str, index: int = 0, low: int = 0, high: int = 1 << 31) -> int | None:
        """A whole number within limits, or None if it is not there.

        Raises:
            BadInput: it is something else.
        """
        value = self.text(*keys, index=index)
        if value is None:
            return None
        word = _bare(value)
        if not _WHOLE.match(word) or not low <= int(word) <= high:
            raise BadInput(
                self.path,
                f"says {self._name(keys[0], index)} := {value[:40]!r}",
                f"a whole number from {low} to {high} is expected",
            )
        return int(word)

    def number(self, *keys: str, index: int = 0) -> float | None:
        """A finite number, or None if it is not there.

        Raises:
            BadInput: it is something else.
        """
        value = self.text(*keys, index=index)
        return None if value is None else self._float(_bare(value), keys[0], index)

    def positive(self, *keys: str, index: int = 0) -> float | None:
        """A number above 0; None if it is not there, or is 0 or below, which is how unknown is written."""
        value = self.number(*keys, index=index)
        return value if value is not None and value > 0 else None

    def wholes(self, *keys: str, index: int = 0, low: int = 0, high: int = 1 << 31) -> list[int] | None:
        """Whole numbers in braces, or a single one; None if they are not there.

        Raises:
            BadInput: they are something else.
        """
        value = self.text(*keys, index=index)
        if value is None:
            return None
        words = [w.strip() for w in _bare(value).strip("{} \t").split(",")]
        if len(words) > _MOST_NUMBERS or any(not _WHOLE.match(w) or not low <= int(w) <= high for w in words):
            raise BadInput(
                self.path,
                f"says {self._name(keys[0], index)} := {value[:40]!r}",
                f"whole numbers from {low} to {high} are expected",
            )
        return [int(w) for w in words]

    def required(self, what: str, value: object) -> None:
        """Refuses a value that is missing.

        Raises:
            BadInput: it is None.
        """
        if value is None:
            raise BadInput(self.path, f"does not say {what!r}", "add the line or export it again")

    def dtype(self) -> np.dtype[np.generic]:
        """The type of the stored numbers, with its byte order.

        Raises:
            BadInput: it is not stated, or of no known kind.
        """
        name = (self.text("number format") or "unsigned integer").lower()
        size = self.whole("number of bytes per pixel", low=1, high=16)
        if size is None and name in ("short float", "long float"):
            size = 4 if name == "short float" else 8
        self.required("number of bytes per pixel", size)
        kind, sizes = _FORMATS.get(name, ("", ()))
        if size not in sizes:
            raise BadInput(
                self.path, f"stores {name[:40]!r} of {size} bytes", "integers of 1, 2, 4 and floats of 4, 8 are read"
            )
        order = self.text("imagedata byte order", "image data byte order")
        if order is not None and order.lower() not in _ORDERS:
            raise BadInput(self.path, f"has byte order {order[:40]!r}", "LITTLEENDIAN or BIGENDIAN is expected")
        return np.dtype(f"{_ORDERS[(order or 'BIGENDIAN').lower()]}{kind}{size}")  # big is Interfile's default

    def offset(self, index: int = 1) -> int:
        """Bytes before the data.

        Raises:
            BadInput: it is no whole number.
        """
        for at in (index, 0):
            value = self.whole("data offset in bytes", index=at, high=1 << 50)
            if value is not None:
                return value
        return 0

    def scale(self) -> float:
        """What stored numbers are to be multiplied with.

        Raises:
            BadInput: it is not finite and positive.
        """
        for key, at in (("image scaling factor", 1), ("image scaling factor", 0), ("quantification units", 0)):
            value = self.number(key, index=at)
            if value is not None:
                check_scaling(self.path, value, 0.0)
                if value <= 0:
                    raise BadInput(
                        self.path, f"says {self._name(key, at)} := {value:g}", "a positive number is expected"
                    )
                return value
        return 1.0

    def data_file(self) -> Path:
        """The file of the numbers, beside the header.

        Raises:
            BadInput: it is not named, or the name leads out of the header's folder.
        """
        name = self.text("name of data file")
        self.required("name of data file", name)
        name = str(name).strip().strip('"')
        folder = self.path.parent
        away = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or "\\" in name
        if "\0" in name or ".." in PurePosixPath(name).parts or len(name) > 4096:
            raise BadInput(
                self.path, f"names the data file {name[:80]!r}", "a file in the header's own folder is expected"
            )
        if away:  # where it lay when it was written; it has travelled with its header
            name = PureWindowsPath(name).name
        return folder / name

    def _float(self, word: str, key: str, index: int) -> float:
        try:
            value = float(word) if len(word) <= 40 else math.nan
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise BadInput(self.path, f"says {self._name(key, index)} := {word[:40]!r}", "a finite number is expected")
        return value

    def _name(self, key: str, index: int) -> str:
        return f"{key!r} [{index}]" if index else repr(key)


def is_interfile(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as an Interfile header does."""
    with Path(path).open("rb") as file:
        return _START.match(file.read(64)) is not None


def read_interfile_header(path: str | os.PathLike[str]) -> InterfileHeader:
    """The keys of a header; no data file is touched.

    Raises:
        BadInput: it is no Interfile header.
    """
    size = check_file(path)
    if size > _MOST_HEADER:
        raise BadInput(path, f"has a header of {size} bytes", f"at most {_MOST_HEADER} are read")
    raw = Path(path).read_bytes()
    if _START.match(raw) is None:
        raise BadInput(path, "is not an Interfile header", "its first line must be !INTERFILE :=")
    if b"\0" in raw:
        raise BadInput(path, "has an Interfile header that is not text", "copy or export it again")
    values: dict[tuple[str, int], str] = {}
    clashes = set()
    for line in raw.decode("latin1").splitlines()[1:]:
        line = line.strip()
        if not line or line.startswith(";"):
            continue
        found = _KEY.match(line) if len(line) <= _MOST_LINE else None
        if found is None:
            continue  # continuation lines and remarks occur in headers of scanners
        key, index = _standard(found[1])
        if key == "end of interfile":
            break
        value = found[2].strip()
        if (key, index) in values and values[key, index] and value and values[key, index] != value:
            clashes.add((key, index))
        values[key, index] = value or values.get((key, index), "")
    return InterfileHeader(Path(path), values, frozenset(clashes))


def _standard(key: str) -> tuple[str, int]:
    index = 0
    found = _INDEX.match(key.strip())
    if found is not None:
        key, index = found[1], int(found[2])
    return " ".join(key.replace("_", " ").replace("!", " ").lower().split()), index


def _bare(value: str) -> str:
    return value.split(";", 1)[0].strip()
