"""How setuptools compiles the kernels: with the headers of the jaxlib that pyproject.toml asks for to build.

Where they do not compile, llamajax is installed without them, and XLA's own code serves.
"""

from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

_PARALLEL = "-flto=auto"


class BuildKernels(build_ext):
    """build_ext, with what depends on the compiler and on jaxlib."""

    def build_extension(self, ext: Extension) -> None:
        """Raises, which setuptools takes as a warning, if there is no jaxlib or no compiler that understands."""
        jaxlib = find_spec("jaxlib")
        if jaxlib is None or jaxlib.origin is None:
            raise RuntimeError("jaxlib's headers are needed")
        ext.include_dirs.append(str(Path(jaxlib.origin).parent / "include"))
        ext.extra_compile_args += ["-O3", "-g0", "-std=c++17", "-Wno-maybe-uninitialized"]
        # Link-time optimization compiles the parts of a program on all cores: 59 s instead of 88 on two.
        ext.extra_compile_args.append(_PARALLEL)
        ext.extra_link_args += ["-g0", _PARALLEL]
        try:
            super().build_extension(ext)
        except CCompilerError:  # a compiler or a linker that does not know it
            ext.extra_compile_args.remove(_PARALLEL)
            ext.extra_link_args.remove(_PARALLEL)
            super().build_extension(ext)
