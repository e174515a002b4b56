# Source this to have a Python with this project's packages as `python`:
#
#     source common/setup_env.sh requirements.txt [more requirement files, relative to the repository]
#
# It takes the active virtual environment, else ~/venv/ddpm, which it creates on first use, and installs the
# requirements once (again when they change); others that start meanwhile wait. Set PYTHON to choose the interpreter
# a new environment is made with.

_ddpm_alone() { # the command, while no other start is in one (the tasks of an array, on machines that share the folder)
    local folder="${VIRTUAL_ENV:-${CONDA_PREFIX:-$HOME/venv}}"
    mkdir -p "$folder" 2>/dev/null || true
    if (: >>"$folder/.ddpm-setup.lock") 2>/dev/null; then
        (
            flock 9 2>/dev/null || true # macOS has none
            "$@"
        ) 9>>"$folder/.ddpm-setup.lock"
    else
        "$@"
    fi
}
_ddpm_create() {
    [ ! -e "$HOME/venv/ddpm/bin/activate" ] || return 0 # the last thing that is written: an interrupted one has none
    echo "creating the virtual environment ~/venv/ddpm"
    "${PYTHON:-python3}" -m venv "$HOME/venv/ddpm"
}
_ddpm_install() { # repository, stamp, requirement files
    local root="$1" stamp="$2"
    shift 2
    [ ! -e "$stamp" ] || return 0
    echo "installing the requirements (once; a few minutes)"
    (cd "$root" && python -m pip install --quiet --disable-pip-version-check "${@/#/-r}") || return 1
    touch "$stamp" 2>/dev/null || true
}
_ddpm_setup() {
    local root stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -e "$HOME/venv/ddpm/bin/activate" ] || _ddpm_alone _ddpm_create || return 1
        source "$HOME/venv/ddpm/bin/activate" || return 1
    fi
    python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $(python --version) in $(command -v python) is too old; Python 3.11 or newer is needed" >&2
        return 1
    }
    stamp="$(python -c 'import sys; print(sys.prefix)')/.ddpm-$(cd "$root" && cat "$@" | cksum | tr ' ' -)"
    [ -e "$stamp" ] || _ddpm_alone _ddpm_install "$root" "$stamp" "$@"
}
_ddpm_setup "$@"
