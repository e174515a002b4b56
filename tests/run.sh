#!/usr/bin/env bash
# Sets up whatever is missing and runs ruff and the tests, in a few processes, of which each takes a file at a time (its
# tests share what its fixtures make, and Slurm's the cluster; one more than cores, as some wait). The rest is pytest's:
# tests/run.sh -k resume; tests/run.sh -n 0 --pdb -k resume for all in one process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source common/setup_env.sh requirements.txt tests/requirements.txt

ruff format --check .
ruff check .
many="$(python -c 'import os; print(min((os.cpu_count() or 1) + 1, 4))')"
python -m pytest tests -n "$many" --dist loadfile --no-loadscope-reorder "$@"
