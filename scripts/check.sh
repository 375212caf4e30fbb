#!/usr/bin/env bash
# Everything a change must pass, in an environment with `pip install -e '.[dev,docs]'`.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff format --check .
ruff check .
mypy llamajax cli
lint-imports
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
pytest "$@"
