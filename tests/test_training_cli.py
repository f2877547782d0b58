"""`recon3d train`: what it says, and that it goes on where it stopped."""

from __future__ import annotations

import yaml
from training_runs import raw
from typer.testing import CliRunner

from recon3d.cli.app import app


def _run(tmp_path, settings, *options):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    return CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml"), *options])


def test_the_command_trains_and_reports(tmp_path):
    settings = raw(tmp_path) | {"steps": 4, "validate_every_steps": 2}
    result = _run(tmp_path, settings)
    assert result.exit_code == 0, result.output
    assert "step 2:" in result.output and "dB at sigma 0.1" in result.output and "images/s" in result.output
    assert "prior: trained prior" in result.output and "budget_minutes" not in result.output
    # nothing is left to do
    assert "prior: trained prior" in _run(tmp_path, settings, "--quiet").output


def test_a_run_by_the_clock_says_that_it_has_no_bits_to_keep(tmp_path):
    settings = raw(tmp_path) | {"steps": None, "budget_minutes": 0.002}
    output = _run(tmp_path, settings).output
    assert output.count("budget_minutes follows the clock") == 1


def test_only_the_first_process_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    result = _run(tmp_path, raw(tmp_path) | {"steps": 1})
    assert result.exit_code == 0 and result.output == ""
