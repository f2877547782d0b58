"""Conditional training: who is paired with whom, on which grid, and that the network learns from the condition."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from test_training_volumes import _dicom

from recon3d.priors import condition_volume, load_prior
from recon3d.priors.checkpoints import read_folder
from recon3d.priors.networks import UNet
from recon3d.priors.training import TrainConfig, train
from recon3d.priors.training.data import SliceData
from recon3d.priors.training.pairs import partners
from recon3d.priors.training.start import start_from

LPS = np.diag([-1.0, -1.0, 3.0, 1.0])


def _save(path: Path, values: np.ndarray, affine: np.ndarray = LPS) -> None:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.float32), affine), path)


def _pair(seed: int, shape=(40, 36, 6)) -> tuple[np.ndarray, np.ndarray]:
    """A body of random brightness per column block, and an MR that is a line of it: 2 (ct + 1100)."""
    rng = np.random.default_rng(seed)
    ct = np.repeat(rng.uniform(-900, 900, (shape[0] // 4, shape[1], shape[2])), 4, axis=0)
    return ct, 2 * (ct + 1100)


@pytest.fixture
def raw(tmp_path: Path) -> dict:
    for k, name in enumerate(("001", "002", "009")):
        ct, mr = _pair(k)
        _save(tmp_path / f"ct_{name}.nii.gz", ct)
        _save(tmp_path / f"mr_{name}_t1.nii.gz", mr)
    return {
        "out": str(tmp_path / "run"),
        "workers": 1,
        "steps": 4,
        "network": {"in_channels": 2, "channels": [8, 16], "blocks": 1, "embedding": 16, "group_size": 8},
        "data": {
            "root": str(tmp_path),
            "validation": "ct_009.nii.gz",
            "sources": [{"path": "ct_*.nii.gz", "condition": "mr_*_t1.nii.gz", "max_block_z": 2}],
            "condition": {
                "validation": "mr_009_t1.nii.gz", "what": "toy MR", "gain_jitter": 0.0, "offset": 1000, "scale": 2000,
            },
            "gain_jitter": 0.0,
            "offset_jitter": 0.0,
            "quarter_turns": 0.5,
            "flip_rows": 0.5,
        },
        "crops": [{"size": 16, "batch": 4}],
        "validate_every_steps": 4,
        "save_every_steps": 2,
        "validation_slices": 2,
        "validation_sigmas": [0.5],
        "bfloat16": False,
        "card": {"name": "toy", "unit": "HU", "scale": 1000},
    }  # fmt: skip


def _data(raw: dict, **changes) -> SliceData:
    return SliceData(TrainConfig.model_validate({**raw, "data": {**raw["data"], **changes}}))


@pytest.mark.parametrize("native", [1.0, 0.0])
def test_target_and_condition_are_cut_and_turned_together(raw, native):
    """Network condition = (2 (1000 t + 1100) - 1000) / 2000 = t + 0.6 in every pixel, however the crop was made."""
    data = _data(raw, native_share=native)
    for step in range(6):
        clean, _, noise, beside = data.batch(step)
        assert clean.shape == noise.shape == beside.shape == (4, 1, 16, 16)
        # cubic kernels overshoot beyond air, where the target is clamped and the condition, well above it, is not
        inside = clean > -0.95
        assert (beside - clean - 0.6).abs()[inside].max() < 1e-4
        assert float(clean.std()) > 0.1


def test_brightness_of_the_condition_varies_apart(raw):
    condition = {**raw["data"]["condition"], "gain_jitter": 0.3}
    plain, varied = _data(raw), _data(raw, condition=condition)
    (x, _, _, c), (y, _, _, d) = plain.batch(0), varied.batch(0)
    assert torch.equal(x[0], y[0])
    gain = (d[0] + 0.5) / (c[0] + 0.5)  # about the background, which is -0.5 in network units
    assert float(gain.std()) < 1e-4 and abs(float(gain.mean()) - 1) > 1e-3


def test_a_condition_on_another_grid_is_met_in_world_coordinates(raw, tmp_path):
    """A ramp in mm on other voxels, turned and shifted: the same ramp at the target's places, cut to where it is."""
    shape, affine = (12, 10, 8), np.array([[0, 0, 2.0, -40], [2.0, 0, 0, -30], [0, -1.5, 0, 16], [0, 0, 0, 1]])
    i, j, k = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.einsum("ab,b...->a...", affine[:3, :3], np.stack([i, j, k])) + affine[:3, 3, None, None, None]
    ramp = np.tensordot([1.0, 2.0, 3.0], world, 1) + 500
    _save(tmp_path / "mr_001_t1.nii.gz", ramp, affine)
    data = _data(raw, sources=[{"path": "ct_001.nii.gz", "condition": "mr_001_t1.nii.gz"}])
    volume = data.volumes[0]
    assert volume.condition is not None and volume.values.shape == volume.condition.shape
    ct = torch.from_numpy(_pair(0)[0].transpose(2, 1, 0) / 1000).float()
    nz, ny, nx = volume.values.shape
    z, y, x = ((ct.shape[a] - n) for a, n in enumerate((nz, ny, nx)))
    at = next(
        (c, b, a) for c in range(z + 1) for b in range(y + 1) for a in range(x + 1)
        if torch.allclose(ct[c : c + nz, b : b + ny, a : a + nx], volume.values)
    )  # fmt: skip
    zz, yy, xx = torch.meshgrid(*(torch.arange(n) + s for n, s in zip((nz, ny, nx), at, strict=True)), indexing="ij")
    want = ((-xx) * 1.0 + (-yy) * 2.0 + 3.0 * zz * 3.0 + 500 - 1000) / 2000
    # beyond the outermost voxel centres of the condition its last value goes on
    inner = (slice(1, -1),) * 3
    assert (volume.condition - want)[inner].abs().max() < 1e-4
    assert min(nz, ny, nx) > 2 and ny < 36 and nx < 40 and not volume.open_air


def test_slices_without_a_condition_are_left_out(raw, tmp_path):
    _, mr = _pair(0)
    mr[..., 4:] = 0
    mr[:7] = 0
    _save(tmp_path / "mr_001_t1.nii.gz", mr)
    volume = next(v for v in _data(raw).volumes if v.name == "ct_001")
    assert volume.values.shape == (4, 36, 33)


def test_a_percentile_scales_as_it_will_at_use(raw):
    condition = {**raw["data"]["condition"], "percentile": 90.0, "offset": 0.0, "scale": 1.0}
    config = TrainConfig.model_validate({**raw, "steps": 1, "data": {**raw["data"], "condition": condition}})
    prior = load_prior(train(config).prior)
    _, mr = _pair(0)
    want = condition_volume(prior.card, torch.from_numpy(mr.transpose(2, 1, 0).copy()).float())
    have = SliceData(config).volumes[0].condition
    assert have is not None and torch.allclose(have, want, atol=1e-5)


def test_names_decide_who_belongs_to_whom(tmp_path):
    for name in ("ct_7.nii", "ct_8.nii", "mr_8_t1.nii", "mr_7_t1.nii"):
        (tmp_path / name).touch()
    targets = sorted(tmp_path.glob("ct_*.nii"))
    assert [p.name for p in partners(targets, "ct_*.nii", "mr_*_t1.nii", tmp_path)] == ["mr_7_t1.nii", "mr_8_t1.nii"]
    (tmp_path / "mr_8_t1.nii").rename(tmp_path / "mr_9_t1.nii")
    with pytest.raises(ValueError, match=r"ct_8\.nii needs a condition .* '8', found mr_7_t1\.nii, mr_9_t1\.nii"):
        partners(targets, "ct_*.nii", "mr_*_t1.nii", tmp_path)
    with pytest.raises(ValueError, match=r"1 wildcards and 'mr\.nii' 0"):
        partners(targets, "ct_*.nii", "mr.nii", tmp_path)
    (tmp_path / "s1").mkdir()
    for name in ("ct.nii", "mr.nii"):
        (tmp_path / "s1" / name).touch()
    assert partners([tmp_path / "s1" / "ct.nii"], "*/ct.nii", "*/mr.nii", tmp_path) == [tmp_path / "s1" / "mr.nii"]


def test_pairs_that_do_not_overlap(raw, tmp_path):
    far = LPS.copy()
    far[0, 3] = 500
    _save(tmp_path / "mr_002_t1.nii.gz", _pair(1)[1], far)
    with pytest.raises(ValueError, match=r"mr_002_t1.* and .*ct_002.* do not overlap in world coordinates"):
        _data(raw)


def test_a_series_of_dicom_may_be_the_target(raw, tmp_path):
    pytest.importorskip("pydicom")
    ct, mr = _pair(4)
    (tmp_path / "ct_004").mkdir()
    for z, plane in enumerate(ct.transpose(2, 1, 0).round()):
        _dicom(tmp_path / "ct_004" / f"{z}.dcm", np.ascontiguousarray(plane, np.int16), z)
    _save(tmp_path / "mr_004_t1.nii.gz", mr)
    data = _data(raw, sources=[{"path": "ct_004", "condition": str(tmp_path / "mr_004_t1.nii.gz")}])
    volume = data.volumes[0]
    assert volume.condition is not None and volume.values.shape == (6, 36, 40)
    assert (volume.condition - volume.values - 0.6).abs().max() < 1e-3  # the CT was rounded to whole HU


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d["data"]["sources"][0].pop("condition"), "lacks a condition"),
        (lambda d: d["data"].pop("condition"), "has a condition"),
        (lambda d: d["network"].update(in_channels=1), r"in_channels must be 2 \(1 for the condition\)"),
    ],
)
def test_half_a_condition_is_refused(raw, change, says):
    change(raw)
    with pytest.raises(ValueError, match=says):
        TrainConfig.model_validate(raw)


def test_the_network_learns_from_the_condition(raw):
    """The target is a line of the condition: even a tiny network, after seconds, uses it at a high noise level."""
    raw |= {"steps": 120, "learning_rate": 5e-3, "log_sigma_mean": 1.0, "log_sigma_std": 0.5, "sigma_range": [0.1, 10]}
    raw |= {"validation_sigmas": [3.0], "save_every_steps": 200, "validate_every_steps": 200, "warmup_steps": 10}
    result = train(TrainConfig.model_validate(raw))
    prior = load_prior(result.prior, precision="float32")
    assert (prior.card.channels, prior.card.cond_channels) == (1, 1)
    assert prior.card.condition is not None and prior.card.condition.what == "toy MR"
    ct, mr = (torch.from_numpy(v.transpose(2, 1, 0).copy()).float()[:, None] for v in _pair(9))
    u = ct + 3000 * torch.randn(ct.shape, generator=torch.Generator().manual_seed(0))
    right, wrong = ((prior.denoise(u, 3000.0, c) - ct).square().mean().sqrt() for c in (mr, mr.flip(-1)))
    assert float(right) < 0.6 * float(ct.std()) < 0.6 * float(wrong)


def test_a_stopped_run_goes_on_to_the_same_bits(raw, tmp_path):
    config = TrainConfig.model_validate(raw)
    whole = read_folder(train(config).prior)[1]
    halves = config.model_copy(update={"out": str(tmp_path / "halves")})
    seen = []
    train(halves, lambda p: seen.append(p.step), lambda: len(seen) == 1)
    resumed = read_folder(train(halves).prior)[1]
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_start_from_an_unconditional_prior_is_blind_at_first(raw, tmp_path):
    plain = {**raw, "out": str(tmp_path / "plain"), "network": {**raw["network"], "in_channels": 1}}
    data = {k: v for k, v in raw["data"].items() if k != "condition"}
    plain["data"] = {**data, "sources": [{"path": "ct_*.nii.gz"}]}
    folder = train(TrainConfig.model_validate(plain)).prior
    net = UNet(TrainConfig.model_validate(raw).network)
    start_from(net, str(folder), 1, 1)
    state = read_folder(folder)[1]
    assert torch.equal(net.stem.weight[:, :1], state["stem.weight"]) and not bool(net.stem.weight[:, 1:].any())
    assert torch.equal(net.head.weight, state["head.weight"])
