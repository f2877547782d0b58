"""What a person looks at after a run: a picture of three planes and a table of figures."""

from recon3d.report.preview import preview
from recon3d.report.table import markdown, metrics_table

__all__ = ["markdown", "metrics_table", "preview"]
