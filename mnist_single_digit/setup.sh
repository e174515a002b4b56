# Source this on a cluster's login or compute node:  source mnist_single_digit/setup.sh
#
# Loads the modules of Alliance Canada clusters where there is a `module` command, and activates ~/venv/ddpm, unless an
# environment is active already. It creates and fills that on first use (do that on a login node, where there is internet).

if command -v module >/dev/null 2>&1; then
    module load python/3.12 python-build-bundle/2024a scipy-stack/2025a opencv/4.12.0 arrow/21.0.0
fi
source "$(dirname "${BASH_SOURCE[0]}")/../common/setup_env.sh" requirements.txt
