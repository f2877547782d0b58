"""recon3d.ops.sense: against the composite of centred transforms in float64, laws, odd sizes, every instruction set."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import pytest
import torch
from laws import adjoint_gap, check_adjoint, check_batch_independent, check_linear, check_threads

from recon3d.ops import _library, pack_maps, sense_normal, sense_toeplitz
from recon3d.ops.sense import SenseMaps, _compact, _lines_reference, _pack_reference, _planes_reference

WIDE = torch.complex128


def fft2c(x):
    return torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


def ifft2c(x):
    return torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(x, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))


@dataclass(frozen=True)
class Case:
    """A stack of slices under one kind of weights: kx, ky, plane, stack, stack-kx, toeplitz or toeplitz-stack."""

    kind: str
    shape: tuple[int, int, int]
    coils: int

    def __str__(self) -> str:
        return f"{self.kind}-{'x'.join(map(str, self.shape))}-{self.coils}"

    def random(self, *shape: int, seed: int = 0, dtype=torch.complex64):
        return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def image(self, seed: int = 0, dtype=torch.complex64):
        return self.random(*self.shape, seed=seed, dtype=dtype)

    def maps(self, dtype=torch.complex64):
        return self.random(self.shape[0], self.coils, *self.shape[1:], seed=7, dtype=dtype)

    def weights(self):
        z, ny, nx = self.shape
        size = {"kx": (nx,), "ky": (ny, 1), "plane": (ny, nx), "stack": (z, ny, nx), "stack-kx": (z, 1, nx),
                "toeplitz": (2 * ny, 2 * nx), "toeplitz-stack": (z, 2 * ny, 2 * nx)}[self.kind]  # fmt: skip
        w = torch.rand(size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        return (w * (w > 0.4)).float()  # neither binary nor full

    def op(self, x):
        which = sense_toeplitz if "toeplitz" in self.kind else sense_normal
        return which(x, self.maps(x.dtype), self.weights())

    def composite(self, x):
        """The definition, coil images and all."""
        s, w = self.maps(x.dtype), self.weights().to(x.real.dtype)
        if "toeplitz" in self.kind:
            _, ny, nx = self.shape
            w = w.expand(self.shape[0], 2 * ny, 2 * nx)[:, None]
            z = torch.fft.ifft2(w * torch.fft.fft2(s * x[:, None], s=(2 * ny, 2 * nx)))[..., :ny, :nx]
        else:
            z = ifft2c(w.expand(self.shape)[:, None] * fft2c(s * x[:, None]))
        return (s.conj() * z).sum(1)


KINDS = ["kx", "ky", "plane", "stack", "stack-kx", "toeplitz", "toeplitz-stack"]
SIZES = [((3, 16, 20), 8), ((2, 31, 45), 13), ((2, 1, 9), 3), ((2, 14, 1), 1), ((2, 22, 37), 3)]
CASES = [Case(kind, shape, coils) for kind in KINDS for shape, coils in SIZES]
# every radix first, last and in the middle, and a radix without a butterfly in each of those places
SCANS = [Case("plane", (1, ny, nx), 2) for ny, nx in ((210, 64), (121, 26), (67, 100), (11, 8), (240, 33), (144, 49))]
SCANS += [Case(kind, (2, 224, 224), coils) for kind, coils in (("kx", 8), ("plane", 3), ("toeplitz", 1))]
SOME = [case for case in CASES if case.shape == (2, 31, 45)]


@pytest.fixture(params=["best", "avx2", "portable"])
def isa(request, monkeypatch):
    """Every instruction-set path of the compiled kernels; a path the machine lacks falls to the next."""
    if request.param != "best":
        monkeypatch.setenv("RECON3D_ISA", request.param)
    return request.param


@functools.cache
def truth(case: Case):
    """The composite in double precision; that of single precision's maps and image; and how far single is from that."""

    @dataclass(frozen=True)
    class AsSeen(Case):
        def maps(self, dtype=WIDE):
            return case.maps().to(WIDE)

    exact = AsSeen(case.kind, case.shape, case.coils).composite(case.image().to(WIDE))
    return case.composite(case.image(dtype=WIDE)), exact, (case.composite(case.image()) - exact).norm()


@pytest.mark.parametrize("case", CASES + SCANS, ids=str)
def test_close_to_float64(case, isa):
    double, exact, single_error = truth(case)
    error = (case.op(case.image()) - exact).norm()
    allowed = 2 * single_error + 4 * torch.finfo(torch.float32).eps * exact.norm()
    assert error <= allowed, f"error {error:.3e} > {allowed:.3e}"
    if case not in SCANS:
        assert (case.op(case.image(dtype=WIDE)) - double).norm() <= 1e-14 * double.norm()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    """The torch definition of the op is the composite too."""
    x, packed = case.image(dtype=WIDE), pack_maps(case.maps(WIDE))
    w = case.weights().double()
    if "toeplitz" in case.kind:
        got = _planes_reference(x, packed.packed(), w.reshape(-1, *w.shape[-2:]), case.coils)
    elif case.kind in ("kx", "ky", "stack-kx"):
        along_y = case.kind == "ky"
        line = torch.fft.ifftshift(w.reshape(-1, case.shape[1 if along_y else 2]), 1)
        got = _lines_reference(x, packed.packed(along_y), line, case.coils, along_y)
    else:
        got = _planes_reference(
            x, packed.packed(), torch.fft.ifftshift(w, (-2, -1)).reshape(-1, *w.shape[-2:]), case.coils
        )
    want = case.composite(x)
    assert (got - want).norm() <= 1e-13 * want.norm()


@pytest.mark.parametrize("case", SOME, ids=str)
def test_self_adjoint(case, isa):
    check_adjoint(case.op, case.op, case.image(), case.image(1))
    check_adjoint(case.op, case.op, case.image(dtype=WIDE), case.image(1, WIDE), 1e-14)


def test_the_adjoint_test_can_fail():
    case = SOME[0]
    assert adjoint_gap(case.op, lambda y: 1.001 * case.op(y), case.op(case.image(1)), case.image(1)) > 1e-6


@pytest.mark.parametrize("case", SOME, ids=str)
def test_linear(case, isa):
    check_linear(case.op, case.image(3), case.image(4))


@pytest.mark.parametrize("case", [Case(k, (5, 12, 18), 11) for k in KINDS], ids=str)
def test_slices_and_threads(case, isa):
    """A slice alone gives the same bits, and so does any number of threads (5 slices never divide evenly)."""
    x, maps, weights = case.image(), case.maps(), case.weights()
    op = sense_toeplitz if "toeplitz" in case.kind else sense_normal

    def part(xs):
        k = next(i for i in range(5) if torch.equal(xs[0], x[i]))
        w = weights[k : k + len(xs)] if "stack" in case.kind else weights
        return op(xs, maps[k : k + len(xs)], w)

    check_batch_independent(part, x)
    check_threads(lambda: op(x, maps, weights))


def test_a_coil_more(isa):
    """Operators of single coils add up to that of all, in whatever lane a coil lies."""
    case = Case("plane", (2, 9, 14), 17)
    x, maps, w = case.image(dtype=WIDE), case.maps(WIDE), case.weights()
    parts = sum(sense_normal(x, maps[:, c : c + 1], w) for c in range(17))
    assert (case.op(x) - parts).norm() <= 1e-14 * parts.norm()


@pytest.mark.parametrize("op", ["normal", "toeplitz"])
def test_full_and_empty_masks(op, isa):
    case = Case("kx", (2, 15, 22), 4)
    x, maps, (_, ny, nx) = case.image(), case.maps(), case.shape
    energy = (maps.abs() ** 2).sum(1) * x
    if op == "toeplitz":
        masks = [torch.ones(2 * ny, 2 * nx), torch.zeros(2 * ny, 2 * nx)]
        full, empty = (sense_toeplitz(x, maps, m) for m in masks)
        assert (full - energy).norm() <= 1e-6 * energy.norm() and not empty.any()
        return
    ramp = torch.ones(ny, nx)
    ramp[0, 0] = 1 + 1e-7  # not constant, so that the planes are run
    for ones in (torch.ones(nx), torch.ones(ny, 1), ramp, torch.ones(1), torch.ones(2, ny, nx)):
        assert (sense_normal(x, maps, ones) - energy).norm() <= 1e-6 * energy.norm()
    for zeros in (torch.zeros(nx), torch.zeros(ny, nx)):
        assert not sense_normal(x, maps, zeros).any()


def test_a_mask_is_reduced_to_what_changes():
    line, column = torch.rand(6), torch.rand(4)
    assert _compact(line.expand(3, 4, 6)).shape == (1, 1, 6)
    assert _compact(column[:, None].expand(3, 4, 6)).shape == (1, 4, 1)
    assert _compact(torch.rand(3, 1, 6).expand(3, 4, 6)).shape == (3, 1, 6)
    almost = line.expand(3, 4, 6).clone()
    almost[2, 3, 5] += 1
    assert _compact(almost).shape == (3, 4, 6)
    case = Case("kx", (2, 10, 12), 5)
    x, maps, w = case.image(), case.maps(), case.weights()
    assert torch.equal(sense_normal(x, maps, w.expand(10, 12)), sense_normal(x, maps, w))
    assert torch.equal(sense_normal(x, maps, w.expand(2, 10, 12).double()), sense_normal(x, maps, w))
    bool_mask = w > 0
    assert torch.equal(sense_normal(x, maps, bool_mask), sense_normal(x, maps, bool_mask.float()))


@pytest.mark.parametrize("case", [Case(k, (3, 8, 12), 3) for k in KINDS], ids=str)
def test_nan_stays_in_its_slice(case, isa):
    """A slice of NaN neither reaches its neighbours nor leaves stale memory in the output."""
    x = case.image()
    clean = case.op(x)
    x[1] = complex(math.nan, math.nan)
    assert torch.equal(case.op(x)[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("kind", ["kx", "ky", "plane", "toeplitz-stack"])
def test_gradcheck(kind):
    case = Case(kind, (2, 2, 3), 2)
    x = case.image(dtype=WIDE).requires_grad_()
    assert torch.autograd.gradcheck(case.op, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(case.op, (x,), fast_mode=True)


@pytest.mark.parametrize("kind", ["kx", "ky", "plane", "toeplitz"])
def test_gradient_is_the_operator(kind):
    case = Case(kind, (2, 9, 10), 5)
    x, y = case.image().requires_grad_(), case.image(1)
    case.op(x).backward(y)
    assert torch.equal(x.grad, case.op(y))


def test_opcheck():
    case = Case("kx", (2, 6, 10), 3)
    packed, x = pack_maps(case.maps()), case.image().requires_grad_()
    ops = torch.ops.recon3d
    torch.library.opcheck(ops.sense_lines.default, (x, packed.packed(True), torch.rand(2, 6), 3, True))
    torch.library.opcheck(ops.sense_planes.default, (x, packed.packed(), torch.rand(2, 12, 20), 3))


def test_layouts(isa):
    """Views in memory and no slices at all give what plain stacks give."""
    for case in (Case(k, (2, 9, 14), 3) for k in ("kx", "ky", "plane", "toeplitz")):
        x = case.image()
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(case.op(turned), case.op(x))
        assert torch.equal(case.op(torch.stack((x, x), -1)[..., 0]), case.op(x))
    packed = pack_maps(torch.ones(0, 3, 9, 14, dtype=torch.complex64))
    assert sense_normal(x[:0], packed, torch.rand(14)).shape == (0, 9, 14)
    assert sense_normal(x[:0], packed, torch.rand(9, 14)).shape == (0, 9, 14)


@pytest.mark.parametrize("dtype", [torch.complex64, WIDE], ids=str)
def test_pack_is_the_reference(isa, dtype):
    for coils in (1, 3, 8, 13, 17):
        maps = Case("kx", (2, 5, 19), coils).maps(dtype)
        for along_y in (False, True):
            assert torch.equal(torch.ops.recon3d.sense_pack(maps, along_y), _pack_reference(maps, along_y))
            turned = maps.transpose(2, 3)
            assert torch.equal(torch.ops.recon3d.sense_pack(turned, along_y), _pack_reference(turned, along_y))
    torch.library.opcheck(torch.ops.recon3d.sense_pack.default, (maps[:, :, :2, :2].clone(), True))


def test_packed_maps():
    maps = torch.randn(2, 11, 5, 6, dtype=torch.complex64)
    packed = pack_maps(maps)
    assert packed.maps.data_ptr() == maps.data_ptr() and packed.coils == 11
    for along_y in (False, True):
        lanes = packed.packed(along_y)
        assert lanes.shape == (2, 2, *((6, 5) if along_y else (5, 6)), 8) and lanes is packed.packed(along_y)
        coils = lanes.permute(0, 1, 4, 2, 3).flatten(1, 2)
        assert torch.equal(coils[:, :11], maps.transpose(2, 3) if along_y else maps) and not coils[:, 11:].any()
    assert packed.to(torch.complex128).maps.dtype == torch.complex128
    x, mask = torch.randn(2, 5, 6, dtype=torch.complex64), torch.rand(6)
    assert torch.equal(sense_normal(x, packed, mask), sense_normal(x, maps, mask))


def test_bad_input():
    x, maps, mask = (
        torch.zeros(2, 4, 6, dtype=torch.complex64),
        torch.ones(2, 3, 4, 6, dtype=torch.complex64),
        torch.ones(6),
    )
    kernel = torch.ones(8, 12)
    with pytest.raises(TypeError, match=r"sense_normal: x must be complex64 or complex128, got torch\.float32"):
        sense_normal(x.real, maps, mask)
    with pytest.raises(ValueError, match=r"sense_normal: x must be \[z, y, x\]"):
        sense_normal(x[0], maps, mask)
    with pytest.raises(ValueError, match="no empty slice"):
        sense_normal(x[:, :0], maps, mask)
    with pytest.raises(ValueError, match=r"maps \(2, 3, 4, 6\) do not fit x \(1, 4, 6\)"):
        sense_normal(x[:1], maps, mask)
    with pytest.raises(TypeError, match=r"maps must be torch\.complex64 on cpu like x"):
        sense_normal(x, maps.to(WIDE), mask)
    with pytest.raises(ValueError, match=r"mask must be \[kx\], \[ky, kx\] or \[z, ky, kx\]"):
        sense_normal(x, maps, torch.ones(4))
    with pytest.raises(ValueError, match="mask must be"):
        sense_normal(x, maps, torch.ones(1, 2, 4, 6))
    with pytest.raises(TypeError, match="mask must be real"):
        sense_normal(x, maps, mask.to(torch.complex64))
    with pytest.raises(ValueError, match="kernel must be"):
        sense_toeplitz(x, maps, torch.ones(4, 6))
    with pytest.raises(ValueError, match="gradients with respect to maps are not offered"):
        sense_normal(x, maps.clone().requires_grad_(), mask)
    with pytest.raises(ValueError, match="gradients with respect to maps are not offered"):
        SenseMaps(maps.clone().requires_grad_())
    with pytest.raises(ValueError, match="gradients with respect to mask are not offered"):
        sense_normal(x, maps, mask.clone().requires_grad_())
    with pytest.raises(ValueError, match="gradients with respect to kernel are not offered"):
        sense_toeplitz(x, maps, kernel.requires_grad_())
    with pytest.raises(ValueError, match=r"SenseMaps: maps must be \[z, coil, y, x\]"):
        pack_maps(maps[0])
    with pytest.raises(TypeError, match="SenseMaps: maps must be complex"):
        pack_maps(maps.real)


def test_the_compiled_op_refuses_what_does_not_fit():
    if not _library.ensure():
        pytest.skip("the compiled kernels are missing")
    x, packed = (
        torch.zeros(2, 4, 6, dtype=torch.complex64),
        pack_maps(torch.ones(2, 3, 4, 6, dtype=torch.complex64)).packed(),
    )
    lines, planes = torch.ops.recon3d.sense_lines, torch.ops.recon3d.sense_planes
    for call in (
        lambda: lines(x, packed, torch.ones(1, 5), 3, False),
        lambda: lines(x, packed, torch.ones(3, 6), 3, False),
        lambda: lines(x, packed, torch.ones(1, 4), 3, True),
        lambda: lines(x, packed, torch.ones(1, 6), 9, False),
        lambda: lines(x, packed, torch.ones(1, 6).double(), 3, False),
        lambda: planes(x, packed, torch.ones(1, 4, 12), 3),
        lambda: planes(x[:1], packed, torch.ones(1, 4, 6), 3),
        lambda: planes(x.real, packed, torch.ones(1, 4, 6), 3),
    ):
        with pytest.raises(RuntimeError):
            call()
