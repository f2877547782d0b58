"""From an exception to an exit code and one sentence."""

from __future__ import annotations

import sys
from typing import Any

OK, USAGE, BAD_INPUT, RESOURCES, FAILED, INTERRUPTED = 0, 2, 3, 4, 5, 130


def explain(error: BaseException) -> tuple[int, str | None]:
    """Exit code and sentence of an error a user can act on; the sentence is None for a defect of ours.

    Nothing is imported for it: a kind of error whose module was never loaded cannot have been raised.
    """
    message = " ".join(str(error).split())
    if hasattr(error, "exit_code"):  # the command line parser's own
        format_message = getattr(error, "format_message", None)
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        return int(error.exit_code), f"{format_message()}{where}" if format_message else ""
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":
        return INTERRUPTED, "interrupted"
    if isinstance(error, _kind("recon3d.engine.executor", "Interrupted")):
        return INTERRUPTED, message or "interrupted"
    if isinstance(error, _kind("recon3d.engine.executor", "NonFiniteError")):
        return FAILED, f"{message}; the last checkpoint is kept"
    if isinstance(error, _kind("recon3d.engine.executor", "ResourceError")):
        return RESOURCES, message
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return RESOURCES, "memory ran out; see what the job needs with recon3d plan"
    if isinstance(error, _kind("recon3d.io.guard", "BadInput")):
        return BAD_INPUT, message
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return RESOURCES, f"{place}{error.strerror or message}"
    if isinstance(error, (ValueError, TypeError, NotImplementedError)):
        # TypeErrors with a name before a colon are checks of ours; others are defects
        if isinstance(error, TypeError) and ":" not in message:
            return FAILED, None
        return USAGE, message
    if isinstance(error, ImportError) and error.name and not error.name.startswith("recon3d"):
        return RESOURCES, f"this needs the package {error.name}, which is not installed"
    return FAILED, None


def _kind(module: str, name: str) -> Any:
    loaded = sys.modules.get(module)
    return getattr(loaded, name) if loaded is not None else ()


def _is_out_of_memory(error: BaseException) -> bool:
    loaded = sys.modules.get("recon3d.engine.executor")
    return bool(loaded is not None and loaded.out_of_memory(error))
