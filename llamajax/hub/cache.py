"""Our cache folder, and what to tell a user whose disk refuses to be written."""

import errno
import os
from pathlib import Path

from llamajax.errors import DiskFullError, LlamaJaxError, PlatformError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def home() -> Path:
    """Our cache folder: $LLAMAJAX_HOME, else the place where this system keeps a user's caches."""
    if chosen := os.environ.get("LLAMAJAX_HOME"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("llamajax", appauthor=False))


def write_error(error: OSError, folder: Path, variable: str) -> LlamaJaxError:
    """One line for a write that failed under `folder`, the place that the environment variable chooses."""
    if error.errno in DISK_FULL:
        return DiskFullError(
            f"no room left in {folder} ({error.strerror}): free some, or set {variable} to a folder on another disk"
        )
    return PlatformError(f"cannot write to {folder} ({error.strerror or error}): set {variable} to a writable folder")
