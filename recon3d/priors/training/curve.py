"""The validation curve of a run as a table and a picture: `validation.csv` and `validation.png`."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from recon3d.priors.checkpoints.atomic import write_bytes, write_text

__all__ = ["write_curve"]

_PSNR = "psnr_db_sigma_"


def write_curve(out: Path, rows: list[dict[str, float]]) -> None:
    """Write the rows measured so far; each has step, train_loss and a loss and PSNR per noise level."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "validation.csv", text.getvalue())

    # the object interface: pyplot would keep global state and look for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in (k for k in rows[-1] if k.startswith(_PSNR)):
        first = rows[0][name]
        gain = [row[name] - first for row in rows]
        label = f"sigma {name.removeprefix(_PSNR)}: {rows[-1][name]:.2f} dB"
        axes.plot([row["step"] for row in rows], gain, marker=".", label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("gain in denoising PSNR since the first point, dB")
    axes.grid(alpha=0.3)
    axes.legend(title="held-out volume, now at")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_bytes(out / "validation.png", picture.getvalue())
