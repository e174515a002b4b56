#!/usr/bin/env bash
# Sets up whatever is missing and runs ruff and the tests. Extra arguments go to pytest: tests/run.sh -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup_env.sh requirements.txt tests/requirements.txt

ruff format --check .
ruff check .
python -m pytest tests "$@"
