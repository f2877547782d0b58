"""Multi-coil MRI: coil maps, then a Fourier transform on a sampling mask or along a trajectory.

    y_zc = F (S_zc x_z)          A^H A x_z = sum over coils of conj(S_zc) F^H F (S_zc x_z)

with F a masked centred orthonormal FFT or a NUFFT (Pruessmann et al., MRM 42 (1999) 952 and 46 (2001) 638). Images are
complex; inner products and adjoints are Hermitian.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self, overload

import torch
from torch import Tensor

from recon3d.geometry import Trajectory
from recon3d.operators.base import LinearOperator, Space
from recon3d.operators.fourier import centred_ifft
from recon3d.ops.density import pipe_menon, ramp
from recon3d.ops.nufft import NufftPlan, nufft, nufft_adjoint, nufft_normal, nufft_plan, nufft_toeplitz_kernel
from recon3d.ops.sense import SenseMaps, pack_maps, sense_normal, sense_toeplitz

__all__ = ["CartesianMRI", "MRIOperator", "NonCartesianMRI"]

# coil images that are transformed together, in bytes (on the host for every thread): more leave the cache
_TOGETHER = {"cpu": 8 * 2**20, "cuda": 2**30}
# samples per pixel from which the Toeplitz form of the normal operator is the faster one, and the accuracy from which
# it always is: 256^2 and 320^2, 5 and 8 coils, one core with 512-bit vectors
_DENSE, _ACCURATE = 0.25, 1e-5


class MRIOperator(LinearOperator):
    """What all multi-coil operators share: coil maps, and a residual that goes through the normal operator.

    Attributes:
        maps: coil maps.
    """

    maps: Tensor
    _given: tuple[Tensor, int, Tensor | None, int, Tensor] | None = None
    _lanes: SenseMaps | None = None

    def residual(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W (y - A x) as A^H W y - A^H W A x; the first term is kept for the next call with the same y."""
        key = (id(y), y._version, id(weights), 0 if weights is None else weights._version)
        held = self._given
        if held is None or (id(held[0]), held[1], id(held[2]), held[3]) != key:
            rhs = self.adjoint(y if weights is None else y * weights)
            self._given = held = (y, key[1], weights, key[3], rhs)
        return held[4] - self.normal(x, weights)

    @abstractmethod
    def coil_images(self, y: Tensor) -> Tensor:
        """The image of every coil, transformed back with the density divided out: like the maps."""

    def rss(self, y: Tensor) -> Tensor:
        """Root of the sum of squares of the coil images, [z, y, x] real: an image without maps."""
        images = self.coil_images(y)
        return torch.linalg.vector_norm(images, dim=-3 if self.coupling == "slice" else -4)

    def norm(self, weights: Tensor | None = None, iterations: int = 20) -> float:
        """As LinearOperator.norm; a single weight scales the plain value."""
        if weights is not None and weights.numel() == 1:
            return abs(weights.item()) * self.norm(None, iterations)
        return super().norm(weights, iterations)

    def _device(self) -> torch.device:
        return self.maps.device

    def _packed(self, dtype: torch.dtype) -> SenseMaps:
        """The maps as the normal operators want them, made once."""
        if self._lanes is None or self._lanes.maps.dtype != dtype:
            self._lanes = pack_maps(self.maps.to(dtype))
        return self._lanes


class CartesianMRI(MRIOperator):
    """A volume [..., z, y, x] to the sampled points of the k-space of every coil, [..., z, coil, ky, kx].

    Points that the mask leaves out are zero. Slices are independent.

    Args:
        mask: 1 where k-space was sampled and 0 elsewhere, broadcast to [slice, ky, kx].
        maps: coil maps, [slice, coil, y, x] complex64; the device of the operator is theirs.

    Raises:
        ValueError: shapes that do not fit, or a mask or maps with NaN.
        TypeError: complex mask or real maps.
    """

    coupling = "slice"

    def __init__(self, mask: Tensor, maps: Tensor) -> None:
        _check_maps("CartesianMRI", maps)
        self.maps = maps
        self.mask = _mask("CartesianMRI", mask, maps)
        slices, coils, ny, nx = maps.shape
        self.domain = Space((slices, ny, nx), torch.complex64, "1")
        self.range = Space((slices, coils, ny, nx), torch.complex64, "1")
        # shifts of image and k-space as phases, which cost less than moving the data
        self._turn, self._shift = (part.to(maps.device) for part in _centring(ny, nx))

    def forward(self, x: Tensor) -> Tensor:
        """M F S x: [..., z, y, x] -> [..., z, coil, ky, kx], slice by slice."""
        _check_shape("CartesianMRI", "the volume", x, self.domain.shape)
        out = x.new_empty((*x.shape[:-3], *self.range.shape), dtype=torch.promote_types(x.dtype, self.maps.dtype))
        x = x * self._turn.to(out.dtype)
        for k in range(x.shape[-3]):
            rows = torch.fft.fft2(x[..., k, None, :, :] * self.maps[k], norm="ortho")
            out[..., k, :, :, :] = rows.mul_(self._sampled(k, out.dtype))
        return out

    def adjoint(self, y: Tensor) -> Tensor:
        """Conjugate transpose of forward: [..., z, coil, ky, kx] -> [..., z, y, x]."""
        _check_shape("CartesianMRI", "k-space", y, self.range.shape)
        kind = torch.promote_types(y.dtype, self.maps.dtype)
        out = y.new_empty((*y.shape[:-4], *self.domain.shape), dtype=kind)
        for k in range(y.shape[-4]):
            images = torch.fft.ifft2(y[..., k, :, :, :] * self._sampled(k, kind).conj(), norm="ortho")
            out[..., k, :, :] = images.mul_(self.maps[k].conj()).sum(-3)
        return out.mul_(self._turn.conj().to(kind))

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W A x without k-space in memory, unless the weights differ from coil to coil."""
        _check_shape("CartesianMRI", "the volume", x, self.domain.shape)
        mask = self.mask.square()
        if weights is not None and weights.numel() > 1:
            if weights.ndim > 4 or (weights.ndim > 2 and weights.shape[-3] != 1):
                return super().normal(x, weights)
            mask = mask * _real(weights).reshape(-1, *weights.shape[-2:] if weights.ndim > 1 else weights.shape)
        out = _each(lambda part: sense_normal(part, self._packed(part.dtype), mask), x, self.maps.dtype)
        return out if weights is None or weights.numel() > 1 else out * weights.real.reshape(())

    def pinv(self, y: Tensor) -> Tensor:
        """Zero-filled: coil images combined with the maps, the least-squares image of a full k-space."""
        return self.adjoint(y) * _inverse_power(self.maps)

    def coil_images(self, y: Tensor) -> Tensor:
        """Zero-filled image of every coil, [..., z, coil, y, x]."""
        _check_shape("CartesianMRI", "k-space", y, self.range.shape)
        return torch.stack([centred_ifft(y[..., k, :, :, :] * self._rows(k)) for k in range(y.shape[-4])], -4)

    def slab(self, start: int, stop: int) -> Self:
        """The operator of slices start to stop - 1 alone."""
        _check_slab("CartesianMRI", start, stop, self.domain.shape[0])
        mask = self.mask if self.mask.shape[0] == 1 else self.mask[start:stop]
        return type(self)(mask, self.maps[start:stop])

    def to(self, device: str | torch.device) -> Self:
        """The same operator on a device."""
        return type(self)(self.mask.to(device), self.maps.to(device))

    def _rows(self, k: int) -> Tensor:
        return self.mask[k if self.mask.shape[0] > 1 else 0]

    def _sampled(self, k: int, dtype: torch.dtype) -> Tensor:
        """The mask of a slice with the phase that stands for a shift of k-space."""
        return (self._rows(k) * self._shift).to(dtype)


class NonCartesianMRI(MRIOperator):
    """A volume [..., z, y, x] to the samples of a trajectory for every coil.

    Trajectories of the plane measure every slice by itself, [..., z, coil, sample]; those of space measure the volume
    as a whole, [..., coil, sample]. (Stacks of stars or spirals are slices after `decouple_stack`.)

    Args:
        trajectory: one for all slices, or one per slice, with the same number of samples each.
        maps: coil maps, [slice, coil, y, x] complex64, or [coil, z, y, x] for a trajectory in space; the device of the
            operator is theirs.
        eps: relative error of the NUFFT.
        density: weight of every sample for `pinv`, [sample] or [slice, sample]; None takes the ramp of spokes where the
            trajectory has them, and Pipe and Menon's iteration elsewhere.
        normal: how A^H A is applied: "toeplitz", "nufft", or "auto", which goes by the number of samples.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: real maps.
    """

    def __init__(
        self,
        trajectory: Trajectory | Sequence[Trajectory],
        maps: Tensor,
        *,
        eps: float = 1e-3,
        density: Tensor | None = None,
        normal: Literal["auto", "toeplitz", "nufft"] = "auto",
    ) -> None:
        given = (trajectory,) if isinstance(trajectory, Trajectory) else tuple(trajectory)
        _check_maps("NonCartesianMRI", maps, *_check_trajectories(given, maps, normal))
        self.trajectories, self.maps, self.eps = given, maps, eps
        first = given[0]
        planar = first.ndim == 2
        self.coupling = "slice" if planar else "volume"
        self.domain = Space((maps.shape[0], *maps.shape[2:]) if planar else maps.shape[1:], torch.complex64, "1")
        self.range = Space((*maps.shape[: 2 if planar else 1], first.n_samples), torch.complex64, "1")
        dense = first.n_samples > _DENSE * math.prod(first.shape) or eps <= _ACCURATE
        self.toeplitz = planar and (normal == "toeplitz" or (normal == "auto" and dense))
        if normal == "toeplitz" and not planar:
            raise ValueError("NonCartesianMRI: the Toeplitz form serves trajectories of the plane; take normal='nufft'")
        self._choice = normal
        self._density = None if density is None else self._checked_density(density)
        self._plans: dict[str, NufftPlan] = {}
        self._kernel: Tensor | None = None
        self._weighted: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Samples of every coil image: [..., z, y, x] -> [..., z, coil, sample] or [..., coil, sample]."""
        _check_shape("NonCartesianMRI", "the volume", x, self.domain.shape)
        kind = torch.promote_types(x.dtype, self.maps.dtype)
        out = x.new_empty((*x.shape[:-3], *self.range.shape), dtype=kind)
        for part, plan in self._parts():
            if self.coupling == "slice":
                out[..., part, :, :] = nufft(x[..., part, None, :, :] * self.maps[part], plan)
            else:
                out[..., part, :] = nufft(x[..., None, :, :, :] * self.maps[part], plan)
        return out

    def adjoint(self, y: Tensor) -> Tensor:
        """Conjugate transpose of forward, exact whatever eps."""
        _check_shape("NonCartesianMRI", "k-space", y, self.range.shape)
        y = y.to(torch.promote_types(y.dtype, self.maps.dtype))
        out = y.new_zeros((*y.shape[: -len(self.range.shape)], *self.domain.shape))
        for part, plan in self._parts():
            if self.coupling == "slice":
                out[..., part, :, :] = (nufft_adjoint(y[..., part, :, :], plan) * self.maps[part].conj()).sum(-3)
            else:
                out = out + (nufft_adjoint(y[..., part, :], plan) * self.maps[part].conj()).sum(-4)
        return out

    def normal(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """A^H W A x; without samples in memory when the weights are one number, or one per sample."""
        _check_shape("NonCartesianMRI", "the volume", x, self.domain.shape)
        samples = self.range.shape[-1]
        if weights is not None and weights.numel() > 1:
            if weights.numel() != samples or weights.shape[-1] != samples:
                return super().normal(x, weights)
            density: Tensor | None = weights.reshape(-1)
        else:
            density = None
        if self.toeplitz:
            kernel = self._toeplitz_kernel(density)
            out = _each(lambda part: sense_toeplitz(part, self._packed(part.dtype), kernel), x, self.maps.dtype)
        else:
            out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, self.maps.dtype))
            for part, plan in self._parts():
                maps = self.maps[part]
                if self.coupling == "slice":
                    images = nufft_normal(x[..., part, None, :, :] * maps, plan, _real(density))
                    out[..., part, :, :] = (images * maps.conj()).sum(-3)
                else:
                    images = nufft_normal(x[..., None, :, :, :] * maps, plan, _real(density))
                    out = out + (images * maps.conj()).sum(-4)
        return out if weights is None or weights.numel() > 1 else out * weights.real.reshape(())

    def pinv(self, y: Tensor) -> Tensor:
        """Gridding: the adjoint of the density-weighted samples, coils combined with the maps."""
        return self.adjoint(y * self.density()) * _inverse_power(self.maps, self._coil_axis)

    def coil_images(self, y: Tensor) -> Tensor:
        """Gridded image of every coil, [..., z, coil, y, x] or [..., coil, z, y, x]."""
        _check_shape("NonCartesianMRI", "k-space", y, self.range.shape)
        y = y * self.density()
        out = y.new_empty((*y.shape[: -len(self.range.shape)], *self.maps.shape))
        for part, plan in self._parts():
            if self.coupling == "slice":
                out[..., part, :, :, :] = nufft_adjoint(y[..., part, :, :], plan)
            else:
                out[..., part, :, :, :] = nufft_adjoint(y[..., part, :], plan)
        return out

    def density(self) -> Tensor:
        """Weights of the samples for gridding, in Nyquist cells; broadcast over the range."""
        if self._density is None:
            made = {t.digest: _density(t) for t in self.trajectories}
            self._density = self._checked_density(torch.stack([made[t.digest] for t in self.trajectories]))
        return self._density

    def slab(self, start: int, stop: int) -> Self:
        """The operator of slices start to stop - 1 alone.

        Raises:
            NotImplementedError: the trajectory is one in space.
        """
        if self.coupling == "volume":
            raise NotImplementedError("NonCartesianMRI: a trajectory in space measures all slices at once")
        _check_slab("NonCartesianMRI", start, stop, self.domain.shape[0])
        one = len(self.trajectories) == 1
        density = self._density
        part = type(self)(
            self.trajectories if one else self.trajectories[start:stop],
            self.maps[start:stop],
            eps=self.eps,
            density=density if density is None else density[:, 0] if density.shape[0] == 1 else density[start:stop, 0],
            normal=self._choice,
        )
        part._plans = self._plans  # of the same trajectories
        if self._kernel is not None:
            part._kernel = self._kernel if one else self._kernel[start:stop]
        return part

    def to(self, device: str | torch.device) -> Self:
        """The same operator on a device."""
        density = self._density
        if density is not None:
            density = density[:, 0] if self.coupling == "slice" else density[0]
        given = self.trajectories
        return type(self)(given, self.maps.to(device), eps=self.eps, density=density, normal=self._choice)

    @property
    def _coil_axis(self) -> int:
        return -3 if self.coupling == "slice" else -4

    def _plan(self, trajectory: Trajectory) -> NufftPlan:
        if trajectory.digest not in self._plans:
            plan = nufft_plan(trajectory.points, trajectory.shape, eps=self.eps)
            self._plans[trajectory.digest] = plan.to(self.maps.device)
        return self._plans[trajectory.digest]

    def _parts(self) -> Iterator[tuple[slice | list[int], NufftPlan]]:
        """Slices (or coils of a volume) that share a trajectory, as many as are transformed together."""
        image = math.prod(self.trajectories[0].shape) * self.maps.element_size()
        kind = self.maps.device.type
        budget = _TOGETHER.get(kind, 2**30) * (torch.get_num_threads() if kind == "cpu" else 1)
        if self.coupling == "volume" or len(self.trajectories) == 1:
            per = image * (1 if self.coupling == "volume" else self.maps.shape[1])
            step, plan = max(1, budget // per), self._plan(self.trajectories[0])
            for first in range(0, self.maps.shape[0], step):
                yield slice(first, min(self.maps.shape[0], first + step)), plan
            return
        step = max(1, budget // (image * self.maps.shape[1]))
        groups: dict[str, list[int]] = {}
        for k, trajectory in enumerate(self.trajectories):
            groups.setdefault(trajectory.digest, []).append(k)
        for members in groups.values():
            plan = self._plan(self.trajectories[members[0]])
            for first in range(0, len(members), step):
                yield members[first : first + step], plan

    def _toeplitz_kernel(self, density: Tensor | None) -> Tensor:
        """[2 y, 2 x], or one per slice; the one for weights is kept until other weights come."""
        if density is None:
            if self._kernel is None:
                self._kernel = self._made_kernel(None)
            return self._kernel
        held = self._weighted
        if held is None or held[0].data_ptr() != density.data_ptr() or held[1] != density._version:
            self._weighted = held = (density, density._version, self._made_kernel(_real(density)))
        return held[2]

    def _made_kernel(self, density: Tensor | None) -> Tensor:
        shape = self.trajectories[0].shape
        made = {
            t.digest: nufft_toeplitz_kernel(self._plan(t), shape, density) for t in dict.fromkeys(self.trajectories)
        }
        kernels = [made[t.digest] for t in self.trajectories]
        return kernels[0] if len(kernels) == 1 else torch.stack(kernels)

    def _checked_density(self, density: Tensor) -> Tensor:
        samples, slices = self.range.shape[-1], self.range.shape[0] if self.coupling == "slice" else 1
        if (
            density.ndim not in (1, 2)
            or density.shape[-1] != samples
            or density.shape[:-1] not in ((), (1,), (slices,))
        ):
            raise ValueError(
                f"NonCartesianMRI: density must be [sample] = ({samples},) or one row per slice, "
                f"got {tuple(density.shape)}"
            )
        if density.is_complex() or not bool(density.isfinite().all()):
            raise ValueError("NonCartesianMRI: density must be real and finite")
        rows = density.reshape(-1, 1, samples) if self.coupling == "slice" else density.reshape(1, samples)
        return rows.to(self.maps.device, self.maps.dtype.to_real())


def _centring(ny: int, nx: int) -> tuple[Tensor, Tensor]:
    """Phases [y, x] of the image and [ky, kx] of k-space that make an FFT from index 0 the centred one.

    With c = N // 2 and e(m) = exp(2 pi i m / N):  e(-(k - c) (i - c)) = e(c (k - c)) e(-k i) e(c i).
    """
    turn: list[Tensor] = []
    shift: list[Tensor] = []
    for n in (ny, nx):
        c, i = n // 2, torch.arange(n, dtype=torch.int64)
        for out, whole in ((turn, c * i), (shift, c * (i - c))):
            angle = (whole % n).double() * (2 * math.pi / n)
            out.append(torch.polar(torch.ones_like(angle), angle))
    return turn[0][:, None] * turn[1], shift[0][:, None] * shift[1]


def _each(normal: Callable[[Tensor], Tensor], x: Tensor, kind: torch.dtype) -> Tensor:
    """A normal operator of [z, y, x] on every volume of a batch."""
    x = x.to(torch.promote_types(x.dtype, kind))
    if x.ndim == 3:
        return normal(x)
    return torch.stack([normal(part) for part in x.flatten(0, -4)]).reshape(x.shape)


def _density(trajectory: Trajectory) -> Tensor:
    try:
        return ramp(trajectory)
    except ValueError:  # not spokes
        return pipe_menon(trajectory)


@overload
def _real(weights: Tensor) -> Tensor: ...
@overload
def _real(weights: None) -> None: ...
def _real(weights: Tensor | None) -> Tensor | None:
    return weights.real if weights is not None and weights.is_complex() else weights


def _check_trajectories(given: tuple[Trajectory, ...], maps: Tensor, normal: str) -> tuple[int]:
    """Whether the trajectories fit the maps; gives the axes that the maps must have."""
    if not given or not all(isinstance(t, Trajectory) for t in given):
        raise TypeError("NonCartesianMRI: give one Trajectory, or one per slice")
    if normal not in ("auto", "toeplitz", "nufft"):
        raise ValueError(f"NonCartesianMRI: normal must be 'auto', 'toeplitz' or 'nufft', got {normal!r}")
    shape, samples = given[0].shape, given[0].n_samples
    if len(shape) not in (2, 3):
        raise ValueError(f"NonCartesianMRI: trajectories of two or three axes are possible, got {len(shape)}")
    for k, t in enumerate(given):
        if t.shape != shape or t.n_samples != samples:
            raise ValueError(
                f"NonCartesianMRI: trajectory {k} has {t.n_samples} samples on {t.shape}, the first {samples} on "
                f"{shape}; all slices need as many on the same grid"
            )
    if maps.ndim == 4 and tuple(maps.shape[4 - len(shape) :]) != shape:
        raise ValueError(f"NonCartesianMRI: the trajectory is for {shape}, the coil maps are {tuple(maps.shape)}")
    allowed = (1, maps.shape[0]) if len(shape) == 2 else (1,)
    if maps.ndim == 4 and len(given) not in allowed:
        raise ValueError(
            f"NonCartesianMRI: {len(given)} trajectories for {maps.shape[0]} slices; give one, or one each"
        )
    return (len(shape),)


def _inverse_power(maps: Tensor, coil_axis: int = -3) -> Tensor:
    power = maps.abs().square().sum(coil_axis)
    return torch.where(power > 1e-6 * power.amax(), 1 / power, 0.0)


def _mask(what: str, mask: Tensor, maps: Tensor) -> Tensor:
    if mask.is_complex():
        raise TypeError(f"{what}: the mask must be real, 1 where k-space was sampled, got {mask.dtype}")
    slices, _, ny, nx = maps.shape
    shape = (1,) * (3 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 3 or any(m not in (1, n) for m, n in zip(shape, (slices, ny, nx), strict=True)):
        raise ValueError(
            f"{what}: the mask {tuple(mask.shape)} does not broadcast to [slice, ky, kx] = {(slices, ny, nx)}; "
            "give one for the k-space that the maps belong to"
        )
    mask = mask.reshape(shape).to(maps.device, maps.real.dtype)
    if not bool(mask.isfinite().all()):
        raise ValueError(f"{what}: the mask holds NaN or infinity; give 1 where k-space was sampled and 0 elsewhere")
    # what is the same along an axis is stored once, which lets the normal operator skip that axis
    if mask.shape[1] > 1 and bool((mask == mask[:, :1]).all()):
        mask = mask[:, :1]
    if mask.shape[2] > 1 and bool((mask == mask[:, :, :1]).all()):
        mask = mask[:, :, :1]
    return mask.contiguous()


def _check_maps(what: str, maps: Tensor, ndim: int = 2) -> None:
    if not maps.is_complex():
        raise TypeError(f"{what}: coil maps must be complex, got {maps.dtype}")
    if maps.ndim != 4 or maps.numel() == 0:
        axes = "[slice, coil, y, x]" if ndim == 2 else "[coil, z, y, x]"
        raise ValueError(f"{what}: coil maps must be {axes}, got {tuple(maps.shape)}")
    if not bool(torch.view_as_real(maps).isfinite().all()):
        raise ValueError(f"{what}: the coil maps hold NaN or infinity; set them to zero outside the object")


def _check_shape(what: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(f"{what}: {name} must end in {shape}, got {tuple(x.shape)}")


def _check_slab(what: str, start: int, stop: int, slices: int) -> None:
    if not 0 <= start < stop <= slices:
        raise ValueError(f"{what}.slab: 0 <= start < stop <= {slices} expected, got {start}, {stop}")
