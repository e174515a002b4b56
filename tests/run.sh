#!/usr/bin/env bash
# Sets up whatever is missing and runs ruff and the tests, in a process per core, of which each takes a file at a time
# (its tests share what its fixtures make, and Slurm's the cluster). Extra arguments go to pytest:
# tests/run.sh -k resume; tests/run.sh -n 0 --pdb -k resume for all in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup_env.sh requirements.txt tests/requirements.txt

ruff format --check .
ruff check .
python -m pytest tests -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
