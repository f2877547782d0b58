"""The recon3d command: one verb per job, one sentence per error, exit codes a batch system can act on."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main", "run"]


def main() -> None:
    """Entry point of the recon3d command and of python -m recon3d."""
    # before torch is imported: threads that spin while they wait for each other make a shared machine crawl
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line; gives the exit code.

    0 done, 2 wrong usage or configuration, 3 bad input, 4 resources (memory, disk, lock), 5 stopped by a numerical
    failure, 130 interrupted and resumable.
    """
    from recon3d.cli.errors import explain

    debug = "--debug" in arguments
    try:
        from recon3d.cli.app import app

        result = app(args=[a for a in arguments if a != "--debug"], prog_name="recon3d", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if debug and not hasattr(error, "exit_code"):
            raise
        code, sentence = explain(error)
        if sentence is None:
            raise
        if sentence:
            print(f"recon3d: {sentence}", file=sys.stderr)
        return code
