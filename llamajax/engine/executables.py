"""Compiled programs on disk, found without tracing what they compute.

jax's own cache knows a program by its code: to trace and lower that takes longer than all else at a process's start.
Here a program is known by the sources and settings that its code is made from. A file that is broken, or belongs to
another version or machine, is never used. Knows nothing of what programs compute.
"""

import hashlib
import os
import pickle
import platform
import secrets
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jax.stages import Compiled, Lowered

import llamajax
from llamajax.ops import native

_PACKAGE = Path(llamajax.__file__).parent
# Whose code decides what is traced.
_SOURCES = (
    "config.py",
    "formats.py",
    "kernels.py",
    "placement.py",
    "rope_scaling.py",
    "sampling.py",
    "types.py",
    "engine/*.py",
    "model/*.py",
    "ops/*.py",
)
_DIGEST_LEN = 32
# Settings of jax that change no program.
_NO_MATTER = (
    "jax_platforms",
    "jax_compilation_cache_",
    "jax_enable_compilation_cache",  # it is off while another thread compiles
    "jax_persistent_cache_",
    "jax_log",
    "jax_explain",
)


class Executables:
    """Programs of one device, and of one kind: `settings` describe all that they have in common."""

    def __init__(self, device: jax.Device, settings: str) -> None:
        self._device = device
        self._environment = _environment(device)
        self.identity = _digest(self._environment, _source_digest(), settings)
        folder = _jax_cache.folder
        self._folder = Path(folder, "llamajax") if folder and "://" not in folder else None

    def get(self, name: str, lower: Callable[[], Lowered], options: Callable[[], dict[str, str | bool]]) -> Compiled:
        """The program of this name, from disk if it is there.

        Args:
          name: unique among programs of these settings.
          lower: makes its code; other sources may make the same.
          options: the compiler's.
        """
        if found := self._load(self._named(name)):
            return found
        lowered = lower()
        code = _digest(self._environment, lowered.as_text(), str(lowered.in_tree), str(lowered.out_tree))
        if found := self._load(code):
            self._link(self._named(name), code)
            return found
        with _jax_cache.off():
            compiled = lowered.compile(options())
        if self._save(code, compiled):
            self._link(self._named(name), code)
        return compiled

    @property
    def is_empty(self) -> bool:
        """Whether programs are kept on disk, but none of these settings is there yet."""
        return self._folder is not None and not any(self._folder.glob(self._named("*")))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name. It may be broken."""
        return self._folder is not None and Path(self._folder, self._named(name)).is_file()

    def _named(self, name: str) -> str:
        return f"{self.identity}-{name}"

    def _load(self, file: str) -> Compiled | None:
        if self._folder is None:
            return None
        began = time.perf_counter()
        try:
            with Path(self._folder, file).open("rb") as stream:
                # Whoever can write the file can run code here.
                if os.fstat(stream.fileno()).st_uid not in (0, os.getuid()):
                    return None
                digest, packed = stream.read(_DIGEST_LEN), stream.read()
            if hashlib.sha256(packed).digest() != digest:
                return None
            payload, arguments, results = pickle.loads(zlib.decompress(packed))
            trees = jax.tree.structure(arguments), jax.tree.structure(results)
            loaded = serialize_executable.deserialize_and_load(
                payload, *trees, backend=self._device.client, execution_devices=[self._device]
            )
        except Exception:  # no file, or whatever jax makes of one that it cannot read: it is compiled anew
            return None
        jax.monitoring.record_event_duration_secs("/llamajax/program_loaded", time.perf_counter() - began)
        return loaded

    def _save(self, file: str, compiled: Compiled) -> bool:
        """Writes a program to disk, if the disk and jax allow it."""
        if self._folder is None:
            return False
        try:
            payload, *trees = serialize_executable.serialize(compiled)
            skeletons = [jax.tree.unflatten(tree, [0] * tree.num_leaves) for tree in trees]
            packed = zlib.compress(pickle.dumps((payload, *skeletons)), 1)
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._replaced(file) as new:
                new.write_bytes(hashlib.sha256(packed).digest() + packed)
        except Exception:  # a full disk, or a program that jax cannot serialize
            return False
        return True

    def _link(self, name: str, file: str) -> None:
        with suppress(OSError), self._replaced(name) as new:
            new.symlink_to(file)

    @contextmanager
    def _replaced(self, name: str) -> Iterator[Path]:
        """A new file that takes the place of another: whole or not at all, whoever else writes it."""
        assert self._folder is not None
        new = Path(self._folder, f"{name}.{secrets.token_hex(8)}")
        try:
            yield new
            new.replace(Path(self._folder, name))
        finally:
            new.unlink(missing_ok=True)


class _JaxCache:
    """Whether jax keeps programs on disk, and where; it is off while a program of ours is compiled."""

    def __init__(self) -> None:
        self._is_on = False
        self._num_off = 0
        self._lock = Lock()

    @property
    def folder(self) -> str | None:
        """None if the user has switched it off."""
        with self._lock:
            is_on = self._is_on if self._num_off else jax.config.values["jax_enable_compilation_cache"]
        return jax.config.values["jax_compilation_cache_dir"] if is_on else None

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, jax compiles anew: what it has read from its cache can be serialized no more."""
        with self._lock:
            if not self._num_off:
                self._is_on = jax.config.values["jax_enable_compilation_cache"]
                self._switch(False)
            self._num_off += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_off -= 1
                if not self._num_off:
                    self._switch(self._is_on)

    def _switch(self, is_on: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", is_on)
        compilation_cache.reset_cache()  # it looks at its settings once


_jax_cache = _JaxCache()


def _environment(device: jax.Device) -> str:
    """All that programs depend on besides their own settings."""
    options = {name: value for name, value in sorted(jax.config.values.items()) if not name.startswith(_NO_MATTER)}
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    versions = llamajax.__version__, jax.__version__, jaxlib.__version__, device.client.platform_version
    kind = device.platform, device.device_kind, native.implementation(), _processor()
    return repr((versions, kind, flags, options, _source_digest()))


@cache
def _processor() -> str:
    """The host's processor, with the instruction sets that it has."""
    parts = [platform.machine(), platform.processor()]
    with suppress(OSError), Path("/proc/cpuinfo").open("rb", buffering=0) as file:
        names = (b"vendor_id", b"cpu family", b"model", b"stepping", b"flags", b"Features", b"CPU ")
        lines = file.read(1 << 14).partition(b"\n\n")[0].splitlines()  # of the first one only
        parts += sorted(line.decode(errors="replace") for line in lines if line.startswith(names))
    return "\n".join(parts)


@cache
def _source_digest() -> str:
    return _digest(*((file.name, file.read_bytes()) for file in _source_files()))


def _source_files() -> list[Path]:
    return sorted(file for pattern in _SOURCES for file in _PACKAGE.glob(pattern))


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
