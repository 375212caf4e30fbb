#!/usr/bin/env bash
# The kernels' tests, with the address and the undefined-behaviour sanitizer in the kernels. In an environment with
# `pip install -e '.[dev]'` and g++; leaves the kernels as they were.
set -euo pipefail
cd "$(dirname "$0")/.."
library=$(python -c 'from llamajax import kernels; print(kernels._LIBRARY)')
include=$(python -c 'import jax; print(jax.ffi.include_dir())')
cp "$library" "$library.kept"
trap 'mv "$library.kept" "$library"' EXIT
g++ -O1 -g -std=c++17 -fPIC -shared -fsanitize=address,undefined -fno-sanitize-recover=undefined \
  -isystem "$include" llamajax/ops/cpu/kernels.cc -o "$library"
# Python and XLA leak by design, and XLA's threads outlive the sanitizer's checks.
ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)" \
  python -m pytest tests/unit/ops/test_native.py tests/unit/ops/test_attention.py tests/unit/ops/test_sample.py "$@"
