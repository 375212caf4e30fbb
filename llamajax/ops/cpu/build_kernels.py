"""How llamajax is built: by setuptools, which compiles the kernels with the headers of the jaxlib in pyproject.toml.

On Linux on x86-64 without a C++ compiler, pip fetches one for the build (Zig's, which is Clang). Elsewhere llamajax is
installed without kernels then, as it is where they do not compile: XLA's own code serves.
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.build_meta import *  # noqa: F403 (the rest of what pip calls)
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

_PARALLEL = "-flto=auto"
# For any processor of the kind, not for the one that compiles: the kernels choose when they are loaded.
_ZIG = [sys.executable, "-m", "ziglang", "c++", "-mcpu=baseline"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What pip fetches to build a wheel, beside what pyproject.toml names."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler_s_package()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As `get_requires_for_build_wheel`, for `pip install -e`."""
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler_s_package()


class BuildKernels(build_ext):
    """build_ext, with what depends on the compiler and on jaxlib."""

    def run(self) -> None:
        """With the compiler that is there."""
        os.environ["CXX"] = shlex.join(_installed() or _ZIG)
        super().run()

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


def _installed() -> list[str] | None:
    """The command of a C++ compiler: that which setuptools would take, if it is there."""
    chosen = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
    return next((command for command in (chosen, ["g++"], ["clang++"]) if shutil.which(command[0])), None)


def _compiler_s_package() -> list[str]:
    is_for_kernels = sys.platform == "linux" and platform.machine() == "x86_64"
    return ["ziglang"] if is_for_kernels and _installed() is None else []
