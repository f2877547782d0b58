"""Training: what the network is shown, and that a run killed at any moment goes on to the same bits."""

from __future__ import annotations

import csv
import os
import signal
import time
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from training_runs import PROCESSES, tell_steps

from recon3d.io import BadInput
from recon3d.priors import load_prior
from recon3d.priors.checkpoints import read_folder, write_folder
from recon3d.priors.checkpoints.atomic import write_bytes
from recon3d.priors.training import TrainConfig, train
from recon3d.priors.training.augment import random_phase, with_lesions
from recon3d.priors.training.config import LesionConfig, PhaseConfig
from recon3d.priors.training.data import SliceData, _place
from recon3d.priors.training.volumes import load_volume

CHECKOUT = Path(__file__).resolve().parents[1]


def _volume(path: Path, seed: int, shape=(40, 36, 6), spacing=(1.0, 1.0, 3.0), axes="LPS") -> np.ndarray:
    """Write discs of soft tissue in air; returns the array in L, P, S order."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.full(shape, -1000.0)
    hu[(x / 0.8) ** 2 + (y / 0.7) ** 2 < 1] = 40
    for _k in range(3):
        cx, cy = rng.uniform(-0.4, 0.4, 2)
        hu[(x - cx) ** 2 + (y - cy) ** 2 < 0.03] = rng.choice([-800, 400])
    lps = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])  # voxel axes run to the left, back and head
    image = nibabel.Nifti1Image(hu.astype(np.int16), lps)
    if axes != "LPS":
        have = nibabel.orientations.axcodes2ornt(("L", "P", "S"))
        want = nibabel.orientations.axcodes2ornt(tuple(axes))
        image = image.as_reoriented(nibabel.orientations.ornt_transform(have, want))
    nibabel.save(image, path)
    return hu


@pytest.fixture
def raw(tmp_path: Path) -> dict:
    """A run of seconds, as its YAML would read."""
    for k in range(2):
        _volume(tmp_path / f"train{k}.nii.gz", k)
    _volume(tmp_path / "held.nii.gz", 9)
    return {
        "out": str(tmp_path / "run"),
        "seed": 4,
        "workers": 1,
        "steps": 8,
        "network": {"channels": [8, 16], "blocks": 1, "embedding": 16, "group_size": 8},
        "data": {
            "root": str(tmp_path),
            "validation": "held.nii.gz",
            "sources": [{"path": "*.nii.gz", "max_block_z": 2}],
            "zoom": [0.8, 1.4],
        },
        "crops": [{"size": 16, "batch": 4, "share": 3}, {"size": 32, "batch": 2}],
        "warmup_steps": 3,
        "save_every_steps": 2,
        "validate_every_steps": 4,
        "validation_slices": 2,
        "validation_sigmas": [0.1, 0.5],
        "samples": 0,
        "bfloat16": False,
        "card": {"name": "tiny", "offset": 0.0193, "scale": 0.0193, "unit": "1/mm"},
    }


def _config(raw: dict, **changes) -> TrainConfig:
    return TrainConfig.model_validate({**raw, **changes})


def _files(out: Path) -> dict[str, bytes]:
    names = ("prior/model.safetensors", "checkpoint.safetensors")
    return {n: (out / n).read_bytes() for n in names}


# ---------------------------------------------------------------- data


def test_held_out_volume_is_never_trained_on(raw):
    data = SliceData(_config(raw))
    assert [v.name for v in data.volumes] == ["train0", "train1"]
    assert data.validation.name == "held"


def test_exclude_and_empty_sources(raw):
    raw["data"]["exclude"] = ["train0"]
    assert [v.name for v in SliceData(_config(raw)).volumes] == ["train1"]
    raw["data"]["exclude"] = ["train0", "train1"]
    with pytest.raises(ValueError, match="no volume matches"):
        SliceData(_config(raw))


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SPL", "PIR"])
def test_rows_run_to_the_back_and_columns_to_the_left(raw, tmp_path, axes):
    hu = _volume(tmp_path / "turned.nii.gz", 3, spacing=(1.0, 1.5, 3.0), axes=axes)
    volume = load_volume(tmp_path / "turned.nii.gz", _config(raw).data)
    assert np.allclose(volume.values.numpy(), hu.transpose(2, 1, 0) / 1000)
    assert volume.spacing_mm == pytest.approx((3.0, 1.5, 1.0))
    assert volume.open_air


def test_other_planes(raw, tmp_path):
    hu = _volume(tmp_path / "v.nii.gz", 3, spacing=(1.0, 1.5, 3.0))
    for plane, order, spacing in (("coronal", (1, 2, 0), (1.5, 3.0, 1.0)), ("sagittal", (0, 2, 1), (1.0, 3.0, 1.5))):
        volume = load_volume(tmp_path / "v.nii.gz", _config(raw, data={**raw["data"], "plane": plane}).data)
        assert np.allclose(volume.values.numpy(), hu.transpose(order) / 1000)
        assert volume.spacing_mm == pytest.approx(spacing)


def test_a_batch_is_a_function_of_seed_and_step(raw):
    a, b, other = SliceData(_config(raw)), SliceData(_config(raw)), SliceData(_config(raw, seed=5))
    b.batch(3)
    for x, y in zip(a.batch(7), b.batch(7), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.batch(7)[0], a.batch(8)[0]) or not torch.equal(a.batch(7)[1], a.batch(8)[1])
    assert not torch.equal(a.batch(7)[1], other.batch(7)[1])


def test_native_crops_are_the_voxels_themselves(raw):
    """No interpolation, no jitter asked for: every crop is a window of a slice, possibly flipped."""
    raw["data"] |= {
        "native_share": 1.0,
        "gain_jitter": 0.0,
        "offset_jitter": 0.0,
        "sources": [{"path": "train0.nii.gz"}],
    }
    raw["crops"] = [{"size": 16, "batch": 2}]
    data = SliceData(_config(raw))
    values = data.volumes[0].values
    windows = values.unfold(1, 16, 1).unfold(2, 16, 1)  # z, row, col, 16, 16
    for step in range(4):
        for crop in data.batch(step)[0][:, 0]:
            flips = [crop, crop.flip(0), crop.flip(1), crop.flip(0, 1)]
            assert any(((windows - f).abs().amax((-1, -2)) < 1e-6).any() for f in flips)


def test_zoom_and_rotation_keep_geometry(raw):
    """A crop of a linear ramp is a ramp with the slope and direction the grid says, at pixel centres."""
    data = SliceData(_config(raw))
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    ramp = 0.01 * (2 * y + x)
    for zoom, angle in ((1.3, 0.2), (0.8, -0.1), (1.0, 0.15)):
        place = _place(np.random.default_rng(0), (64, 64), 24, zoom, angle, False)
        crop = data._cut(ramp, 24, place, angle, False)
        c, s = np.cos(angle) * zoom, np.sin(angle) * zoom
        down, right = crop[8:-8, 8:-8].diff(dim=0).mean(), crop[8:-8, 8:-8].diff(dim=1).mean()
        assert float(down) == pytest.approx(0.01 * (2 * c + s), rel=0.02)  # torch's cubic kernel is not exact on ramps
        assert float(right) == pytest.approx(0.01 * (c - 2 * s), rel=0.02)  # torch's cubic kernel is not exact on ramps


def test_noise_levels_follow_the_distribution(raw):
    cfg = _config(raw, log_sigma_mean=-1.5, log_sigma_std=1.2, sigma_range=[1e-6, 1e6])
    data = SliceData(cfg)
    logs = torch.cat([data.batch(k)[1] for k in range(150)]).log()
    assert float(logs.mean()) == pytest.approx(-1.5, abs=0.08)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.08)


def test_slices_are_thickened_only_where_allowed(raw):
    raw["data"] |= {"native_share": 1.0, "gain_jitter": 0.0, "offset_jitter": 0.0}
    raw["data"]["sources"] = [{"path": "train0.nii.gz", "max_block_z": 1}]
    data = SliceData(_config(raw))
    seen = torch.cat([data.batch(k)[0].flatten() for k in range(20)]).unique()
    allowed = torch.cat([data.volumes[0].values.flatten().unique(), torch.tensor([-1.024])])
    assert bool((torch.cdist(seen[:, None], allowed[:, None]).amin(dim=1) < 1e-6).all())


@pytest.mark.parametrize("content", [None, b"", b"\x1f\x8b\x08 cut short", b"x" * 400])
def test_volumes_that_cannot_be_read(raw, tmp_path, content):
    if content is not None:
        (tmp_path / "bad.nii.gz").write_bytes(content)
    with pytest.raises(BadInput, match=r"bad\.nii\.gz: cannot be read"):
        load_volume(tmp_path / "bad.nii.gz", _config(raw).data)


@pytest.mark.parametrize("values", [np.zeros((4, 4), np.float32), np.full((4, 4, 4), np.nan, np.float32)])
def test_volumes_that_cannot_train(raw, tmp_path, values):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "bad.nii.gz")
    with pytest.raises(ValueError, match=r"bad\.nii\.gz"):
        load_volume(tmp_path / "bad.nii.gz", _config(raw).data)


# ---------------------------------------------------------------- magnitudes and complex slices

MAGNITUDES = {"clip": [0, 1e9], "file_scale": 1.0, "percentile": 99.0, "background": 0, "least_mean": 0.02}
PLAIN = {"native_share": 1.0, "gain_jitter": 0.0, "offset_jitter": 0.0, "flip_rows": 0.0}


@pytest.fixture
def mr(raw, tmp_path) -> dict:
    """The same run on magnitudes: discs of signal in empty air, brighter from volume to volume."""
    for k, name in enumerate(("train0", "train1", "held")):
        values = (_volume(tmp_path / f"{name}.nii.gz", k) + 1000) * (k + 1)
        nibabel.save(
            nibabel.Nifti1Image(values.astype(np.int16), np.diag([-1, -1, 3, 1.0])), tmp_path / f"{name}.nii.gz"
        )
    network = {**raw["network"], "in_channels": 2, "out_channels": 2}
    return {**raw, "network": network, "data": {**raw["data"], **MAGNITUDES, "complex": True}, "sigma_data": 0.4}


def _one_channel(mr: dict, **data) -> SliceData:
    network = {**mr["network"], "in_channels": 1, "out_channels": 1}
    return SliceData(_config(mr, network=network, data={**mr["data"], "complex": False, **PLAIN, **data}))


def test_each_volume_has_its_own_scale(mr):
    for volume in _one_channel(mr).volumes:
        assert float(torch.quantile(volume.values, 0.99)) == pytest.approx(1, abs=0.01) and volume.open_air


def test_a_percentile_must_be_above_zero(mr, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 3), np.int16), np.eye(4)), tmp_path / "train1.nii.gz")
    with pytest.raises(ValueError, match=r"train1\.nii\.gz: percentile 99 is not above"):
        SliceData(_config(mr))


def test_the_floor_empties_air_and_keeps_signal(mr):
    plain, floored = _one_channel(mr).volumes[0].values, _one_channel(mr, floor=0.3).volumes[0].values
    assert torch.allclose(floored, (plain**2 - 0.09).clamp(min=0).sqrt(), atol=1e-6)
    assert float(floored.amin()) == 0 and float(floored.amax()) > 0.9


def test_complex_crops_are_the_magnitudes_under_a_smooth_phase(mr):
    """Twice the same random numbers, once without phase: magnitudes agree, and phases hardly change per pixel."""
    mr["crops"], mr["data"]["phase"] = [{"size": 32, "batch": 4}], {"step": 0.0, "flat": 0.0}
    data = SliceData(_config(mr, data={**mr["data"], **PLAIN, "sources": [{"path": "train0.nii.gz"}]}))
    windows = data.volumes[0].values.unfold(1, 32, 1).unfold(2, 32, 1)
    turns = []
    for step in range(6):
        clean, _, noise = data.batch(step)
        assert clean.shape == noise.shape == (4, 2, 32, 32)
        for x in torch.complex(clean[:, 0], clean[:, 1]):
            found = [(windows - f).abs().amax((-1, -2)).amin() for f in (x.abs(), x.abs().flip(1))]
            assert min(found) < 1e-5
            z = x[x.abs().amin(dim=1) > 0.1]
            turns.append((z[:, 1:] * z[:, :-1].conj()).angle().abs().max() if z.numel() else torch.zeros(()))
    assert 0.01 < float(torch.stack(turns).max()) < 0.6


def test_phase_options():
    config, m = _PHASES["flat"], torch.rand(24, 40)
    flat = random_phase(np.random.default_rng(0), m, config)
    assert float(flat.amax() - flat.amin()) == 0 and flat.shape == m.shape
    assert float(random_phase(np.random.default_rng(1), m, config)[0, 0]) != float(flat[0, 0])
    m = torch.zeros(24, 40)
    m[8:16, 8:16] = 1
    steps = [random_phase(np.random.default_rng(k), m, _PHASES["step"]) for k in range(8)]
    assert max(float((p[8, 8] - p[0, 0]).abs()) for p in steps) > 0.5  # bright against dark
    assert all(float((p[8, 8] - p[15, 15]).abs()) < 1e-5 for p in steps)


_PHASES = {
    "flat": PhaseConfig(flat=1.0),
    "step": PhaseConfig(flat=0.0, slope=0.0, bowl=0.0, waves=0.0, step=1.0),
}


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({"gain": [0.5, 0.5]}, lambda x, y: torch.allclose(y, 0.5 * x)),
        ({"gamma": [1.5, 1.5]}, lambda x, y: torch.allclose(y, x**1.5, atol=1e-6)),
        ({"quarter_turns": 1.0}, lambda x, y: torch.equal(y.amax((-1, -2)), x.amax((-1, -2)))),
        ({"shading": 3.0}, lambda x, y: torch.equal(x == 0, y == 0) and 1.05 < _ratio(x, y) <= 3.001),
    ],
)
def test_intensity_and_pose(mr, change, holds):
    mr["crops"] = [{"size": 32, "batch": 1}]
    before, after = _one_channel(mr), _one_channel(mr, **change)
    for step in range(3):
        x, y = before.batch(step)[0], after.batch(step)[0]
        assert holds(x, y) and not torch.equal(x, y)


def _ratio(x: torch.Tensor, y: torch.Tensor) -> float:
    field = y[x > 0] / x[x > 0]
    return float(field.amax() / field.amin())


def test_complex_validation_is_fixed_and_keeps_the_magnitude(mr):
    a, b = SliceData(_config(mr)).validation_set(), SliceData(_config(mr)).validation_set()
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].shape == a[1].shape == (2, 2, 36, 40)
    held = SliceData(_config(mr)).validation.values
    for x in a[0]:
        assert (x.square().sum(0).sqrt() - held).abs().amax((-1, -2)).amin() < 1e-5


def test_a_complex_prior_learns(mr):
    result = train(_config(mr, steps=50, learning_rate=5e-3, validate_every_steps=50))
    assert result.validation[0.5] > 6.02 + 5
    card = load_prior(result.prior).card
    assert card.channels == 2 and card.value_range is None
    assert card.training["one network unit"] == "percentile 99 of a volume"


def test_init_takes_what_fits(mr, raw, tmp_path):
    """A one-channel run starts a two-channel one: all but the first and the last convolution."""
    first = train(_config(raw, steps=4, warmup_steps=0))
    _, state = read_folder(first.prior)
    second = train(_config(mr, out=str(tmp_path / "second"), init=str(first.prior), steps=1, learning_rate=1e-12))
    _, got = read_folder(second.prior)
    same = {k for k in got if got[k].shape == state[k].shape and torch.allclose(got[k], state[k], atol=1e-4)}
    assert set(got) - same == {"stem.weight", "head.weight", "head.bias"}
    assert load_prior(second.prior).card.training["init"] == "prior"
    with pytest.raises(ValueError, match="no tensor with a name and shape"):
        (tmp_path / "empty").mkdir()
        write_folder(tmp_path / "empty", load_prior(first.prior).card, {"x": torch.zeros(1)})
        train(_config(mr, out=str(tmp_path / "third"), init=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": {"channels": [8, 16], "group_size": 8}}, "must be 2 where data.complex is True"),
        ({"data": {"background": -1024}}, "need magnitudes"),
        ({"data": {"clip": [-5, 10]}}, "need magnitudes"),
        ({"data": {"gain": [0, 1]}}, "gain must be"),
        ({"data": {"gamma": [1.4, 0.7]}}, "gamma must be"),
        ({"data": {"percentile": 101}}, "percentile"),
        ({"data": {"shading": 0.5}}, "shading"),
    ],
)
def test_complex_config_rejects(mr, changes, says):
    if "data" in changes:
        changes["data"] = {**mr["data"], **changes["data"]}
    with pytest.raises(ValueError, match=says):
        _config(mr, **changes)


# ---------------------------------------------------------------- activity

ACTIVITY = {"percentile": None, "mean_above": 0.01, "complex": False}


def test_activity_is_in_units_of_its_mean_above_a_share_of_the_maximum(mr):
    for volume in _one_channel(mr, **ACTIVITY).volumes:
        values = volume.values
        assert float(values[values > 0.01 * values.max()].mean()) == pytest.approx(1, abs=1e-5) and volume.open_air


def test_activity_has_a_unit_of_its_own_in_the_card(mr):
    network = {**mr["network"], "in_channels": 1, "out_channels": 1}
    result = train(_config(mr, steps=1, network=network, data={**mr["data"], **ACTIVITY}))
    card = load_prior(result.prior).card
    assert card.value_range is None
    assert card.training["one network unit"] == "mean of the voxels above 0.01 of the maximum of a volume"


def test_no_activity_cannot_train(mr, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 3), np.int16), np.eye(4)), tmp_path / "train1.nii.gz")
    with pytest.raises(ValueError, match=r"train1\.nii\.gz: mean_above needs values above 0"):
        _one_channel(mr, **ACTIVITY)


def test_lesions_are_where_activity_is(mr):
    x = torch.zeros(48, 40)
    x[8:40, 6:30] = 1.0
    rng = np.random.default_rng(3)
    hot = LesionConfig(share=1, most=1, radius_px=(2.0, 4.0), hot=(3.0, 5.0), cold_share=0)
    cold = LesionConfig(share=1, most=1, radius_px=(3.0, 4.0), cold=(0.0, 0.2), cold_share=1)
    for _ in range(10):
        y, z = with_lesions(rng, x, hot), with_lesions(rng, x, cold)
        # next to the border its surroundings are half empty, so that the spot is weaker there
        assert 1.5 < float(y.max()) < 6 and float((y - x).min()) > -1e-6
        assert float((x - z)[8:40, 6:30].max()) > 0.4 and float(z.min()) >= 0
        assert int((y > 1.5 * x + 0.5).sum()) < 3.2 * 4**2 * 1.5
    assert torch.equal(with_lesions(rng, torch.zeros(8, 8), hot), torch.zeros(8, 8))


def test_lesions_come_in_their_share_of_crops_and_spoil_no_other_draw(mr):
    mr["crops"] = [{"size": 32, "batch": 8}]
    plain = _one_channel(mr, **ACTIVITY).batch(2)[0]
    some = _one_channel(mr, **ACTIVITY, lesions={"share": 0.0, "most": 2}).batch(2)[0]
    assert torch.equal(plain, some)
    every = _one_channel(mr, **ACTIVITY, lesions={"share": 1.0, "cold_share": 0.0}).batch(2)[0]
    assert float(every.max()) > 1.2 * float(plain.max())


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"mean_above": 0.01}, "percentile or mean_above"),
        ({"percentile": None, "mean_above": 1.0}, "mean_above"),
        ({"lesions": {"share": 0.1, "radius_px": [3, 1]}}, "lesions"),
        ({"lesions": {"share": 0.1}, "background": -1024}, "lesions need activity"),
    ],
)
def test_activity_config_rejects(mr, data, says):
    with pytest.raises(ValueError, match=says):
        _config(mr, data={**mr["data"], **data})


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget_minutes": 1}, "exactly one of steps and budget_minutes"),
        ({"steps": None}, "exactly one of steps and budget_minutes"),
        ({"learning_rat": 1e-3}, "learning_rat"),
        ({"crops": [{"size": 9}]}, "multiple of"),
        ({"sigma_range": [1, 0.1]}, "sigma_range"),
        ({"steps": 0}, "steps"),
    ],
)
def test_config_rejects(raw, changes, says):
    with pytest.raises(ValueError, match=says):
        _config(raw, **changes)


def test_config_from_yaml(raw, tmp_path):
    import yaml

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    assert TrainConfig.load(tmp_path / "c.yaml") == _config(raw)
    (tmp_path / "c.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="mapping"):
        TrainConfig.load(tmp_path / "c.yaml")


def test_the_packaged_configurations_read():
    config = TrainConfig.load(CHECKOUT / "docs" / "train_ct.yaml")
    assert config.card.name == "ct" and config.card.scale == config.card.offset == 0.0193
    config = TrainConfig.load(CHECKOUT / "docs" / "train_mr.yaml")
    assert config.data.complex and (config.card.name, config.card.offset, config.card.scale) == ("mr", 0.0, 1.0)
    assert Path(config.data.validation).name == "mr_brain_oms20_t1w.nii.gz"
    config = TrainConfig.load(CHECKOUT / "docs" / "train_pet.yaml")
    assert config.data.mean_above == 0.01 and (config.card.name, config.card.offset, config.card.scale) == (
        "pet",
        0.0,
        1.0,
    )
    assert Path(config.data.validation).name == "pet_extremity_sts036.nii.gz"
    config = TrainConfig.load(CHECKOUT / "docs" / "train_mr_to_ct.yaml")
    assert config.cond_channels == 1 and Path(config.data.validation).name == "ct_extremity_sts036.nii.gz"


# ---------------------------------------------------------------- the run


def test_learns_and_reports(raw):
    seen = []
    result = train(_config(raw, steps=90, learning_rate=5e-3, validate_every_steps=30), seen.append)
    assert result.finished and [p.step for p in seen] == list(range(1, 91))
    assert seen[-1].fraction == 1.0 and seen[-1].saved
    rows = list(csv.DictReader((result.out / "validation.csv").open()))
    assert [int(r["step"]) for r in rows] == [30, 60, 90]
    for sigma in ("0.1", "0.5"):
        assert float(rows[-1][f"psnr_db_sigma_{sigma}"]) > float(rows[0][f"psnr_db_sigma_{sigma}"])
    # better than no denoising at all: PSNR of the noise is -20 log10(sigma)
    assert result.validation[0.5] > 6.02 + 6
    assert (result.out / "validation.png").read_bytes().startswith(b"\x89PNG")
    prior = load_prior(result.prior)
    assert prior.card.name == "tiny" and prior.card.training["steps"] == 90
    assert prior.card.training_data == ("train0", "train1") and prior.card.validation["volume"] == "held"
    assert prior.card.value_range == pytest.approx((0.0193 * (1 - 1.024), 0.0193 * 4.072))


def test_global_state_is_left_alone(raw):
    torch.manual_seed(1)
    want, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(1)
    train(_config(raw, steps=2))
    assert torch.equal(torch.rand(1), want) and torch.get_num_threads() == threads


@pytest.mark.parametrize("bfloat16", [False, True])
def test_stopped_and_resumed_to_the_bit(raw, tmp_path, bfloat16):
    whole = train(_config(raw, bfloat16=bfloat16))
    cut = _config(raw, bfloat16=bfloat16, out=str(tmp_path / "cut"))
    steps = []
    stopped = train(cut, lambda p: steps.append(p.step), lambda: len(steps) >= 2)
    assert not stopped.finished and stopped.step == 3 and (tmp_path / "cut/prior/card.json").exists()
    resumed = train(cut, lambda p: steps.append(p.step))
    assert resumed.finished and steps == list(range(1, 9))
    a, b = _files(whole.out), _files(resumed.out)
    assert a["prior/model.safetensors"] == b["prior/model.safetensors"]
    assert _tensors(a["checkpoint.safetensors"]) == _tensors(b["checkpoint.safetensors"])
    first, second = ((r.out / "validation.csv").read_text().splitlines() for r in (whole, resumed))
    assert [_timeless(r) for r in first] == [_timeless(r) for r in second]


def _tensors(content: bytes) -> dict[str, bytes]:
    from safetensors.torch import load

    return {k: v.numpy().tobytes() for k, v in load(content).items()}


def _timeless(row: str) -> list[str]:
    cells = row.split(",")
    return cells[:2] + cells[3:]  # without elapsed_s


def test_killed_and_resumed_to_the_bit(raw, tmp_path):
    """kill -9 at moments nobody chose, again and again, until the run is through."""
    raw["steps"] = 16
    whole = train(_config(raw))
    raw["out"] = str(tmp_path / "killed")
    codes = []
    for attempt in range(6):
        here, there = PROCESSES.Pipe(duplex=False)
        run = PROCESSES.Process(target=tell_steps, args=(raw, there))
        run.start()
        there.close()
        told = 0
        try:
            while attempt >= 2 or told < 5 + attempt:
                here.recv()
                told += 1
            time.sleep(0.003 * attempt)
            run.kill()
        except EOFError:  # it ended by itself
            pass
        run.join(120)
        codes.append(run.exitcode)
        if run.exitcode == 0:
            break
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert _files(whole.out)["prior/model.safetensors"] == _files(tmp_path / "killed")["prior/model.safetensors"]


def test_another_configuration_does_not_resume(raw):
    train(_config(raw, steps=2))
    with pytest.raises(ValueError, match="learning_rate"):
        train(_config(raw, steps=4, learning_rate=1e-5))
    assert train(_config(raw, steps=4)).step == 4


def test_a_damaged_checkpoint_is_named(raw):
    result = train(_config(raw, steps=2))
    (result.out / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(BadInput, match=r"checkpoint\.safetensors"):
        train(_config(raw, steps=4))


def test_minutes_instead_of_steps(raw):
    seen = []
    raw |= {"steps": None, "budget_minutes": 0.02, "save_every_steps": None, "save_every_s": 0.2, "warmup_steps": 0}
    result = train(_config(raw, validate_every_steps=None), seen.append)
    assert result.finished and 1.2 <= seen[-1].elapsed_s < 20
    assert seen[-1].learning_rate < seen[0].learning_rate
    assert all(a.fraction <= b.fraction for a, b in pairwise(seen))


def test_not_a_number_stops_the_run(raw):
    with pytest.raises(FloatingPointError, match="step"):
        train(_config(raw, steps=60, learning_rate=1e30, warmup_steps=0, save_every_steps=100))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_bytes(tmp_path / "f", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_bytes(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]
