"""Training on groups of neighbouring slices: cut alike, in any plane, and known by the card that comes out."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from recon3d.priors import load_prior
from recon3d.priors.base import ModelCard
from recon3d.priors.checkpoints import read_folder
from recon3d.priors.training import TrainConfig, train
from recon3d.priors.training.augment import random_phase, with_lesions
from recon3d.priors.training.config import LesionConfig, PhaseConfig
from recon3d.priors.training.data import SliceData
from recon3d.priors.training.volumes import load_volume

SHAPE = (20, 24, 28)  # z, y, x
PLAIN = {"native_share": 1.0, "gain_jitter": 0.0, "offset_jitter": 0.0, "flip_rows": 0.0}


def _write(path: Path, values: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> None:
    """[z, y, x] to a file whose axes run to the left, back and head."""
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0).astype(np.float32), affine), path)


@pytest.fixture
def raw(tmp_path: Path) -> dict:
    rng = np.random.default_rng(0)
    for name in ("train", "held"):
        _write(tmp_path / f"{name}.nii.gz", rng.random(SHAPE) + 1.0)
    return {
        "out": str(tmp_path / "run"),
        "seed": 4,
        "workers": 1,
        "steps": 2,
        "network": {
            "in_channels": 3,
            "out_channels": 3,
            "channels": [8, 16],
            "blocks": 1,
            "embedding": 16,
            "group_size": 8,
        },
        "data": {
            "root": str(tmp_path),
            "validation": "held.nii.gz",
            "sources": [{"path": "train.nii.gz"}],
            "slices": 3,
            "clip": [0, 1e9],
            "file_scale": 1.0,
            "background": 0,
            "least_mean": 0.05,
            **PLAIN,
        },
        "crops": [{"size": 16, "batch": 4}],
        "validation_slices": 2,
        "validation_sigmas": [0.1],
        "bfloat16": False,
    }


def _data(raw: dict, **data) -> SliceData:
    return SliceData(_config(raw, **data))


def _config(raw: dict, **data) -> TrainConfig:
    return TrainConfig.model_validate({**raw, "data": {**raw["data"], **data}})


def _one_slice(raw: dict) -> dict:
    """As `raw`, of one slice at a time."""
    network = {**raw["network"], "in_channels": 1, "out_channels": 1}
    return {**raw, "network": network, "data": {**raw["data"], "slices": 1}}


def test_crops_are_windows_of_neighbours(raw):
    data = _data(raw)
    windows = data.volumes[0].values.unfold(1, 16, 1).unfold(2, 16, 1)  # z, row, col, 16, 16
    orders = set()
    for step in range(6):
        clean, _, noise = data.batch(step)
        assert clean.shape == noise.shape == (4, 3, 16, 16)
        for crop in clean:
            at = [
                next(
                    (hit for f in (s, s.flip(1)) for hit in ((windows - f).abs().amax((-1, -2)) < 1e-6).nonzero()), None
                )
                for s in crop
            ]
            assert all(a is not None for a in at)
            z = [int(a[0]) for a in at]
            orders.add(z[1] - z[0])
            assert z[2] - z[1] == z[1] - z[0] and len({tuple(a[1:].tolist()) for a in at}) == 1
    assert orders == {1, -1}  # from both sides


def test_all_slices_are_cut_and_lit_alike(raw):
    """A volume constant along z stays so through zoom, rotation, thickening, gain, shading and gamma."""
    values = np.broadcast_to(np.random.default_rng(1).random(SHAPE[1:]) + 1, SHAPE)
    _write(Path(raw["data"]["root"]) / "train.nii.gz", values)
    change = {"native_share": 0.3, "gain_jitter": 0.1, "gain": [0.5, 1.5], "gamma": [0.7, 1.4], "shading": 2.0}
    source = {"path": "train.nii.gz", "max_block_z": 3}
    data = _data(raw, **change, zoom=[0.8, 1.3], quarter_turns=0.5, flip_rows=0.5, sources=[source])
    for step in range(6):
        clean = data.batch(step)[0]
        # three equal numbers may be averaged with a rounding
        assert torch.allclose(clean, clean[:, 1:2].expand_as(clean), atol=2e-6)


def test_thick_neighbours_do_not_overlap(raw):
    values = np.broadcast_to(np.arange(20.0)[:, None, None] + 1, SHAPE)
    _write(Path(raw["data"]["root"]) / "train.nii.gz", values)
    data = _data(raw, sources=[{"path": "train.nii.gz", "max_block_z": 4}])
    steps = {round(float(d)) for k in range(12) for d in data.batch(k)[0].diff(dim=1).abs().flatten()}
    assert steps == {1, 2, 3, 4}


@pytest.mark.parametrize(("plane", "order"), [("axial", (0, 1, 2)), ("coronal", (1, 0, 2)), ("sagittal", (2, 0, 1))])
def test_a_source_has_its_own_plane(raw, plane, order):
    sources = [{"path": "train.nii.gz"}, {"path": "train.nii.gz", "plane": plane}]
    first, second = _data(raw, sources=sources).volumes
    assert torch.equal(second.values, first.values.permute(order).contiguous())
    card = train(_config(raw, sources=sources)).prior
    assert load_prior(card).card.plane == ("axial" if plane == "axial" else "any")


def test_a_volume_thinner_than_a_crop_is_refused(raw, tmp_path):
    _write(tmp_path / "thin.nii.gz", np.ones((2, 24, 28)))
    with pytest.raises(ValueError, match=r"thin\.nii\.gz: crops have 3 axial slices, it has 2"):
        load_volume(tmp_path / "thin.nii.gz", _config(raw).data)


def test_lesions_are_ellipsoids():
    lesions = LesionConfig(share=1, most=1, radius_px=(4.0, 4.0), hot=(3.0, 3.0), cold_share=0, edge_px=(0.3, 0.3))
    rng, x = np.random.default_rng(2), torch.ones(9, 32, 32)
    areas = []
    for _ in range(40):
        y = with_lesions(rng, x, lesions, step_px=2.0)
        areas.append(((y - x) > 1).sum((1, 2)))
    areas = torch.stack(areas).float()
    assert float(areas.max()) == pytest.approx(np.pi * 4**2, rel=0.15)
    assert int((areas > 0).sum(1).max()) <= 5  # 8 pixels are four steps of two
    middle = areas[areas.argmax(1) == 4]
    assert len(middle) and bool((middle[:, 4] > middle[:, 3]).all() or (middle[:, 4] >= middle[:, 5]).all())
    assert len(set(areas.argmax(1).tolist())) > 4  # anywhere along z


def test_one_slice_has_the_spots_of_a_plane():
    lesions, x = LesionConfig(share=1), torch.rand(24, 24) + 0.5
    flat = with_lesions(np.random.default_rng(5), x, lesions)
    assert torch.equal(with_lesions(np.random.default_rng(5), x[None], lesions)[0], flat)


def test_phases_of_neighbours_differ_little():
    phase = PhaseConfig(flat=0.0, step=0.0)
    p = random_phase(np.random.default_rng(3), torch.ones(3, 40, 40), phase, step_px=3.0)
    assert p.shape == (3, 40, 40) and 0 < float(p.diff(dim=0).abs().max()) < 0.3
    one = random_phase(np.random.default_rng(3), torch.ones(40, 40), phase)
    assert torch.equal(p[0], one)


def test_complex_groups_hold_all_real_parts_first(raw):
    network = {**raw["network"], "in_channels": 6, "out_channels": 6}
    flat = {"flat": 1.0, "step": 0.0}  # one phase for the crop
    data = _data({**raw, "network": network}, complex=True, phase=flat)
    for clean in (data.batch(0)[0], data.validation_set()[0]):
        assert clean.shape[1] == 6
        assert torch.allclose(clean[:, :3] / clean[:, 3:], (clean[:, :1] / clean[:, 3:4]), rtol=1e-3)


def test_validation_is_of_neighbours(raw):
    clean, noise = _data(raw).validation_set()
    values = _data(raw).validation.values
    assert clean.shape == noise.shape == (2, 3, 24, 28)
    for group in clean:
        z = [int((values == s).all(-1).all(-1).nonzero()) for s in group]
        assert z == [z[0], z[0] + 1, z[0] + 2]


def test_the_network_must_have_a_channel_per_slice(raw):
    with pytest.raises(ValueError, match=r"must be 3 where data.complex is False and data.slices is 3, got 1 and 1"):
        _config({**raw, "network": {**raw["network"], "in_channels": 1, "out_channels": 1}})


def test_the_card_knows_its_slices_and_one_slice_starts_three(raw, tmp_path):
    one = train(TrainConfig.model_validate(_one_slice(raw)))
    assert load_prior(one.prior).card.slices == 1
    changes = {"out": str(tmp_path / "three"), "init": str(one.prior), "steps": 1, "learning_rate": 1e-12}
    three = train(TrainConfig.model_validate({**raw, **changes}))
    prior = load_prior(three.prior)
    assert (prior.card.slices, prior.card.channels) == (3, 3)
    (_, a), (_, b) = read_folder(one.prior), read_folder(three.prior)
    assert set(a) == set(b)
    assert torch.allclose(b["stem.weight"].sum(1), a["stem.weight"].sum(1), atol=2e-3)  # stored as float16
    assert not torch.allclose(b["stem.weight"][:, 0], b["stem.weight"][:, 1], atol=0.05)  # or they never would differ
    for k in range(3):
        assert torch.allclose(b["head.weight"][k], a["head.weight"][0], atol=1e-4)


def test_a_card_divides_its_channels_among_slices():
    with pytest.raises(ValueError, match="channels must be a multiple of slices, got 2 and 3"):
        ModelCard(name="x", channels=2, slices=3)
