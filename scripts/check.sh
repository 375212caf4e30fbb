#!/usr/bin/env bash
# Everything a change must pass, in an environment with `pip install -e '.[dev]'`.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy llamajax cli
lint-imports
pytest "$@"
