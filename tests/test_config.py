"""Job files: strict, one sentence per mistake, the same job after a round trip."""

from __future__ import annotations

import pytest
import yaml

from recon3d.config import ConfigError, JobConfig, load_config, parse_yaml, read_yaml, save_config


def test_defaults_and_round_trip(tmp_path):
    config = load_config(values={"input.path": "scan.h5"}, overrides=["grid.shape=[3, 64, 48]", "noise.kind=poisson",
                                                                       "noise.photons=5e4", "seed=7"])  # fmt: skip
    assert config.grid.shape == (3, 64, 48) and config.noise.photons == 5e4 and config.seed == 7
    path = tmp_path / "job.yaml"
    path.write_text(save_config(config))
    assert load_config(path) == config
    assert set(yaml.safe_load(path.read_text())) == set(JobConfig.model_fields)  # every default is written out


def test_later_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("seed: 1\ncheckpoint: {every_seconds: 1}\n")
    config = load_config(path, ["seed=2", "seed=3"], {"seed": 4})
    assert config.seed == 3 and config.checkpoint.every_seconds == 1.0


def test_the_machine_is_not_part_of_the_meaning():
    base = load_config()
    assert (
        load_config(overrides=["compute.workers=1", "checkpoint.every_levels=1", "input.path=b.h5"]).meaning()
        == base.meaning()
    )
    assert load_config(overrides=["seed=1"]).meaning() != base.meaning()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("compute: {batch_sise: 3}", r"unknown key compute\.batch_sise; did you mean batch_size\?$"),
        ("qqqq: 3", r"unknown key qqqq; allowed are input, grid, "),
        ("seed: 1.5", r"seed: .*integer, got 1\.5$"),
        ("seed: '3'", r"seed: .*integer, got '3'$"),
        ("seed: -1", r"seed: .*greater than or equal to 0, got -1$"),
        ("grid: {shape: [1, 2]}", r"grid\.shape"),
        ("grid: {spacing_mm: [1, 1, 0]}", r"grid\.spacing_mm\.2: .*greater than 0, got 0$"),
        ("grid: {spacing_mm: [1, 1, .nan]}", r"grid\.spacing_mm\.2: .*finite"),
        ("compute: {device: tpu}", r"compute\.device: .*'auto', 'cpu' or 'cuda', got 'tpu'"),
        ("noise: {kind: poisson}", r"noise: kind poisson needs photons$"),
        ("noise: {sigma: 0.1}", r"noise: sigma belongs to kind gaussian, got kind auto$"),
        ("seed: 1\nseed: 2", r"line 2 \(key 'seed' twice\)$"),
        ("a: &x [1]\nb: *x", r"anchors are not allowed"),
        ("a: !!python/object/apply:os.system ['true']", r"not valid YAML"),
        ("[1, 2]", r"expected keys and values, got a list$"),
        ("a: [", r"not valid YAML at line "),
        ("[" * 3000, r"not valid YAML"),
        ("compute: 3", r"compute: .*got 3$"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 300 + len(str(path))


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "seed.x=1", "seed=[", ".seed=1"])
def test_overrides_are_checked(override):
    with pytest.raises(ConfigError):
        load_config(overrides=["seed=1", override])


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "big.yaml").write_text("a: " + "b" * (1 << 20))
    with pytest.raises(ConfigError, match="too large"):
        read_yaml(tmp_path / "big.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_yaml(tmp_path / "bytes.yaml")
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == JobConfig()


def test_numbers_are_numbers():
    assert parse_yaml("[1e-3, 1E5, -2e+4, 1.5e3]", "x") == [1e-3, 1e5, -2e4, 1500.0]
