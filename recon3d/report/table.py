"""Methods side by side in a table of figures, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# header, path into what `recon3d.metrics.compare` returns (with data_fit's figures under "data"), format
_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("PSNR axial dB", ("axial", "psnr_db"), ".2f"),
    ("coronal", ("coronal", "psnr_db"), ".2f"),
    ("sagittal", ("sagittal", "psnr_db"), ".2f"),
    ("SSIM axial", ("axial", "ssim"), ".4f"),
    ("coronal", ("coronal", "ssim"), ".4f"),
    ("sagittal", ("sagittal", "ssim"), ".4f"),
    ("RMSE", ("volume", "rmse"), ".3g"),
    ("hot recovery", ("recovery", "hot"), ".2f"),
    ("cold", ("recovery", "cold"), ".2f"),
    ("noise", ("recovery", "noise"), ".3f"),
    ("z ratio", ("through_plane", "ratio"), ".2f"),
    ("chi2/ray", ("data", "chi2_per_ray"), ".2f"),
    ("seconds", ("seconds",), ".1f"),
)


def metrics_table(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, one row a method; columns that no method fills are left out.

    Args:
        results: by method, what `recon3d.metrics.compare` returns; optionally with `data_fit`'s figures under "data"
            and a wall time under "seconds".

    >>> metrics_table({"fbp": {"volume": {"rmse": 41.26}}})
    (['method', 'RMSE'], [['fbp', '41.3']])
    """
    unit = next((r["settings"]["unit"] for r in results.values() if "settings" in r), None)
    headers, columns = ["method"], []
    for header, path, form in _COLUMNS:
        values = [_at(result, path) for result in results.values()]
        if any(value is not None for value in values):
            headers.append(f"{header} {unit}" if header == "RMSE" and unit else header)
            columns.append(["-" if value is None else format(value, form) for value in values])
    return headers, [[name, *row] for name, row in zip(results, zip(*columns, strict=True), strict=True)]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded so that it reads in a terminal too.

    >>> print(markdown(["a", "b"], [["x", "1.5"]]))
    | a |   b |
    |---|----:|
    | x | 1.5 |
    """
    widths = [max(len(str(row[k])) for row in [headers, *rows]) for k in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (str(cell) for cell in cells)
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(headers), rule, *(line(row) for row in rows)])


def _at(result: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = result
    for key in path:
        if not isinstance(value, Mapping) or value.get(key) is None:
            return None
        value = value[key]
    return float(value)
