# Sourced by the other scripts: sets up a virtual environment with the pinned packages, and the settings that all runs
# share. Paths that a user passes are relative to the folder from which the script is called; paths of the project's own
# files begin with "$project". Needs Python 3.11 or newer, bash and pip. Nothing is installed outside the project.
#
#   PYTHON=python3.12 bash script/...   the interpreter that creates the environment
#   VENV=/path bash script/...          another folder for it; VENV= (empty) uses the active environment

set -euo pipefail
called_from="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV="${VENV-$PWD/.venv}"
case "$VENV" in "" | /*) ;; *) VENV="$called_from/$VENV" ;; esac
if [ -n "$VENV" ]; then
    if [ -L "$VENV" ]; then  # installing would change the environment of another project
        echo "error: $VENV is a link to another environment; activate that and set VENV= to use it, or remove the link" >&2
        exit 2
    fi
    stamp="$VENV/.installed"
    wanted="$(cat requirements.txt pyproject.toml | cksum) $PWD"
    if [ ! -x "$VENV/bin/python" ]; then
        PYTHON="${PYTHON:-$(command -v python3 || command -v python || true)}"
        if [ -z "$PYTHON" ] || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python" >&2
            exit 2
        fi
        echo "creating a virtual environment in $VENV" >&2
        # A half-made environment would be taken for a complete one the next time.
        "$PYTHON" -m venv "$VENV" || { rm -f "$VENV/bin/python"; exit 2; }
    fi
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        echo "installing requirements.txt into $VENV (takes some minutes the first time)" >&2
        # DeepSpeed then compiles its optional kernels when they are first used, not here.
        DS_BUILD_OPS=0 "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet -r requirements.txt
        printf '%s' "$wanted" > "$stamp"
    fi
    export PATH="$VENV/bin:$PATH"
fi

export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-true}"

cores() {  # cores : print the number of CPU cores that this process may use
    python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())'
}

project="$PWD/"
cd "$called_from"
if [ "$PWD/" = "$project" ]; then project=""; fi
