"""tvz: the one-pass ADMM update of TV along z and the normal operator, against eager torch and torch.compile.

The rivals do the same arithmetic: `eager` is the expression as one would write it, `compiled` the same through
torch.compile into the same outputs. The rival "copy of as many bytes" is the floor: as many bytes read and written as
the op cannot avoid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softshrink

from bench._common import Gate, Row, compare, relative_error
from recon3d.ops import tvz, tvz_normal, tvz_update, tvz_update_

THRESHOLD, SCALE, WEIGHT = 0.05, 1.3, 0.7


def run(quick: bool, device: str = "cpu") -> list[Row]:
    """Rows for one volume: update in place, update into new volumes, normal operator added in place."""
    shape = (8, 128, 128) if quick else (48, 256, 256) if device == "cpu" else (256, 512, 512)
    generator = torch.Generator().manual_seed(0)
    x, w0, q0 = (0.1 * torch.randn(shape, generator=generator).to(device) for _ in range(3))
    case = f"{shape[0]} slices of {shape[1]}²"
    settings = {"rounds": 3 if quick else 7, "device": device}
    truth = tvz._update(x.double(), w0.double(), THRESHOLD, SCALE, False)
    rows: list[Row] = []

    def worst(outputs: tuple[Tensor, ...]) -> float:
        return max(relative_error(a, b) for a, b in zip(outputs, truth, strict=True))

    # in place: every call starts from the last one's dual, which changes values and not the work
    z, w, g = torch.empty_like(x), w0.clone(), torch.empty_like(x)
    tvz_update_(x, z, w, g, THRESHOLD, SCALE)
    gates = [Gate("error", worst((z, w, g)), 1e-6)]
    ew = w0.clone()
    eager = lambda: _into(_eager(x, ew), (z, ew, g))  # noqa: E731
    rivals: dict[str, Callable[[], object]] = {"eager": eager}
    if not quick:
        compiled = torch.compile(_into_eager)
        rivals["compiled"] = lambda: compiled(x, z, ew, g)
    rivals["copy of as many bytes"] = _copies(x, 5)
    errors = {k: worst(_eager(x, w0)) for k in ("eager", "compiled")}
    rows += compare(
        "tvz", case, "update in place", lambda: tvz_update_(x, z, w, g, THRESHOLD, SCALE), rivals,
        gates=gates, errors=errors, bytes_moved=5 * x.nbytes, **settings,
    )  # fmt: skip
    rivals = {"eager": lambda: _eager(x, w0)}
    if not quick:
        compiled_new = torch.compile(_eager)
        rivals["compiled"] = lambda: compiled_new(x, w0)
    rows += compare(
        "tvz", case, "update", lambda: tvz_update(x, x, w0, THRESHOLD, SCALE), rivals,
        gates=[Gate("error", worst(tvz_update(x, x, w0, THRESHOLD, SCALE)), 1e-6)],
        errors=errors, bytes_moved=5 * x.nbytes, **settings,
    )  # fmt: skip

    # the same sum again and again into q: only its values grow
    want = q0.double() + tvz._normal(x.double(), WEIGHT, False)
    q = q0.clone()
    rivals = {"eager": lambda: q.add_(_eager_normal(x), alpha=WEIGHT)}
    if not quick:
        compiled_normal = torch.compile(lambda q, x: q.add_(_eager_normal(x), alpha=WEIGHT))
        rivals["compiled"] = lambda: compiled_normal(q, x)
    rivals["copy of as many bytes"] = _copies(x, 3)
    rows += compare(
        "tvz", case, "add D^T D x", lambda: tvz_normal(x, WEIGHT, add_to=q), rivals,
        gates=[Gate("error", relative_error(tvz_normal(x, WEIGHT, add_to=q0.clone()), want), 1e-6)],
        errors={"eager": relative_error(q0 + WEIGHT * _eager_normal(x), want)},
        bytes_moved=3 * x.nbytes, **settings,
    )  # fmt: skip
    return rows


def _eager(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a = w.clone()
    a[:-1] += SCALE * (x[1:] - x[:-1])
    z = softshrink(a, THRESHOLD)
    w_new = a - z
    v = SCALE * (z - w_new)[:-1]
    g = torch.zeros_like(x)
    g[1:] += v
    g[:-1] -= v
    return z, w_new, g


def _into(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> None:
    for a, b in zip(old, new, strict=True):
        a.copy_(b)


def _into_eager(x: Tensor, z: Tensor, w: Tensor, g: Tensor) -> None:
    _into(_eager(x, w), (z, w, g))


def _eager_normal(x: Tensor) -> Tensor:
    d = x[1:] - x[:-1]
    out = torch.zeros_like(x)
    out[1:] += d
    out[:-1] -= d
    return out


def _copies(x: Tensor, volumes: int) -> Callable[[], object]:
    """Copy so many bytes that reads and writes together make `volumes` times x."""
    source = torch.empty(volumes * x.numel() // 2, device=x.device, dtype=x.dtype).fill_(1)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
