# Source this to have a Python with this project's packages as `python`:
#
#     source common/setup_env.sh requirements.txt [more requirement files, relative to the repository]
#
# It takes the active virtual or conda environment, whose programs it puts first in PATH where others had come before
# them (as modules do that were loaded since), else ~/venv/ddpm, which it creates on first use, and installs the
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
_ddpm_new_enough() { # is this Python?
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
_ddpm_is_in() { # is `python` in this environment?
    local prefix
    [ -n "$1" ] || return 1
    prefix="$(python -c 'import os, sys; print(os.path.realpath(sys.prefix))' 2>/dev/null)" || return 1
    [ "$prefix" = "$(cd "$1" 2>/dev/null && pwd -P)" ]
}
_ddpm_create() {
    [ ! -e "$HOME/venv/ddpm/bin/activate" ] || return 0 # the last thing that is written: an interrupted one has none
    local python
    for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        ! _ddpm_new_enough "$python" || break
        [ -z "${PYTHON:-}" ] || break # that one and no other
    done
    _ddpm_new_enough "$python" || {
        echo "error: ${PYTHON:-python3} is not there or too old: install Python 3.11 or newer, or set PYTHON to its path" >&2
        return 1
    }
    echo "creating the virtual environment ~/venv/ddpm"
    "$python" -m venv "$HOME/venv/ddpm"
}
_ddpm_install() { # repository, stamp, requirement files
    local root="$1" stamp="$2"
    shift 2
    [ ! -e "$stamp" ] || return 0
    echo "installing the requirements (once; a few minutes)"
    (cd "$root" && python -m pip install --quiet --disable-pip-version-check "${@/#/-r}") || {
        echo "error: the requirements could not be installed (pip says why). Where there is no internet, as on compute" \
            "nodes, install them on a login node first: source mnist_single_digit/setup.sh" >&2
        return 1
    }
    touch "$stamp" 2>/dev/null || true
}
_ddpm_setup() {
    local root stamp before active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || return 1
    if [ -z "$active" ]; then
        [ -e "$HOME/venv/ddpm/bin/activate" ] || _ddpm_alone _ddpm_create || return 1
        _ddpm_new_enough "$HOME/venv/ddpm/bin/python" || {
            echo "error: the Python of ~/venv/ddpm is gone or older than 3.11: remove that folder, and start again" >&2
            return 1
        }
        source "$HOME/venv/ddpm/bin/activate" || return 1
        active="$HOME/venv/ddpm"
    elif ! _ddpm_is_in "${VIRTUAL_ENV:-}" && ! _ddpm_is_in "${CONDA_PREFIX:-}"; then
        before="$PATH" PATH="$active/bin:$PATH"
        hash -r 2>/dev/null || true
        _ddpm_is_in "$active" || active="" PATH="$before"
    fi
    [ -n "$active" ] && _ddpm_new_enough python || {
        echo "error: the Python of the active environment is not there or older than 3.11: activate another" >&2
        return 1
    }
    stamp="$(python -c 'import sys; print(sys.prefix)')/.ddpm-$(cd "$root" && cat "$@" | cksum | tr ' ' -)"
    [ -e "$stamp" ] || _ddpm_alone _ddpm_install "$root" "$stamp" "$@"
}
_ddpm_setup "$@"
