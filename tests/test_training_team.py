"""Several processes: the same weights everywhere, the loss of one process with the whole batch, resumed to the bit."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from training_runs import PROCESSES, config, member, raw

from recon3d.priors.training import Progress, train
from recon3d.priors.training.team import Team


def _launch(settings: dict[str, Any], folder: Path, die: int = 0) -> list[int | None]:
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        out = str(folder / f"rank{rank}.safetensors")
        runs.append(PROCESSES.Process(target=member, args=(settings, rank, 2, port, out, die)))
        runs[-1].start()
    for run in runs:
        run.join(240)
    return [run.exitcode for run in runs]


def test_two_processes_learn_as_one_and_resume_to_the_bit(tmp_path):
    settings = raw(tmp_path) | {"steps": 6, "save_every_steps": 2, "crops": [{"size": 16, "batch": 3}]}
    told: list[Progress] = []
    one = train(config(settings), told.append)
    assert _launch(settings | {"out": str(tmp_path / "two")}, tmp_path / "a") == [0, 0]
    first, second = (load_file(tmp_path / "a" / f"rank{k}.safetensors") for k in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert _loss(tmp_path / "a" / "rank1.safetensors") == pytest.approx(told[-1].loss, rel=1e-4)
    alone = load_file(one.out / "checkpoint.safetensors")
    for k, value in first.items():
        # sums of three images in another order; Adam divides by tiny moments at first
        assert torch.allclose(value, alone[f"model.{k}"], rtol=1e-3, atol=2e-5), k

    killed = settings | {"out": str(tmp_path / "killed")}
    assert set(_launch(killed, tmp_path / "b", die=5)) == {-9}
    assert _launch(killed, tmp_path / "b") == [0, 0]
    for rank in range(2):
        again = load_file(tmp_path / "b" / f"rank{rank}.safetensors")
        assert all(torch.equal(first[k], again[k]) for k in first)


def _loss(file: Path) -> float:
    with safe_open(file, framework="pt") as content:
        return float(content.metadata()["loss"])


@pytest.mark.parametrize(("n", "size"), [(8, 2), (7, 3), (2, 4), (5, 1)])
def test_shares_cover_a_batch(n, size):
    shares = [Team(rank, size).share(n) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_exchanged():
    x = torch.ones(2)
    Team().add([x])
    assert torch.equal(x, torch.ones(2)) and Team().agree(1.5, 2.0) == (1.5, 2.0) and Team().first
