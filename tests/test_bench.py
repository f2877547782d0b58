"""The timing harness: a failed gate refuses, rivals are timed in turn, rows are kept."""

import csv
import math
import time

import pytest
import torch

from bench import _common
from bench._common import Gate, Refused, compare


def rows(error=0.0):
    return compare(
        "nothing", "1 ms", "wait", lambda: time.sleep(1e-3), {"slower": lambda: time.sleep(4e-3)},
        gates=[Gate("error", error, 1e-6)], errors={"slower": 0.5}, rounds=1,
    )  # fmt: skip


def test_ratio_is_rival_over_ours():
    (row,) = rows()
    # a loaded machine stretches both, never turns the order round
    assert row.ratio > 1.5 and row.ratio == row.rival_ms / row.ours_ms
    assert row.rival_error == 0.5 and row.ours_cpu_ms < row.ours_ms


@pytest.mark.parametrize("error", [1e-5, math.nan, math.inf])
def test_failed_gate_refuses_to_time(error):
    with pytest.raises(Refused, match="nothing, 1 ms, wait: not timed, error is"):
        rows(error)


def test_no_gate_is_refused():
    with pytest.raises(ValueError, match="at least one gate"):
        compare("nothing", "", "", lambda: None, {}, gates=[])


def test_peak_memory_sees_a_temporary():
    assert _common.peak_mb(lambda: torch.ones(32 << 18).sum()) == pytest.approx(32, abs=4)


def test_rows_are_appended(tmp_path):
    for _ in range(2):
        _common.record(rows(), tmp_path)
    with (tmp_path / "nothing.csv").open() as file:
        kept = list(csv.DictReader(file))
    assert len(kept) == 2 and kept[0]["rival"] == "slower" and "torch" in kept[0]["versions"]
    assert "slower" in _common.table(rows())
