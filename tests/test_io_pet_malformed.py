"""A hundred damaged or hostile PET files per reader: a sentence or sound numbers, within 1 GiB, nothing left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from malformed import SPARE_BYTES

pytest.importorskip("petsird")
pytest.importorskip("pydicom")

from malformed_pet import READERS

HERE = Path(__file__).resolve().parent
COUNT = 100
# readers that share a process
GROUPS = ["interfile,siemens,petlink,factors,image", "petsird,dicom"]


def test_every_reader_is_tried():
    assert sorted(",".join(GROUPS).split(",")) == sorted(READERS)


@pytest.mark.parametrize("group", GROUPS)
def test_malformed(tmp_path, group):
    done = subprocess.run(
        [sys.executable, str(HERE / "malformed_pet.py"), group, str(COUNT)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"the process died ({done.returncode}): {done.stderr[-2000:]}"
    for reader, result in json.loads(done.stdout.splitlines()[-1]).items():
        assert not result["failures"], "\n".join(result["failures"])
        assert result["refused"] + result["read"] == COUNT
        # most damage is noticed; a flipped count or a changed dose cannot be
        assert result["refused"] >= COUNT // 2, f"{reader} hardly refuses anything"
        assert result["extra_mib"] < SPARE_BYTES / 2**20
    assert not list(tmp_path.iterdir())
