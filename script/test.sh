#!/usr/bin/env bash
# Runs the linter, then the tests in parallel workers. Creates or reuses the environment.
#
#   bash script/test.sh                      everything, including a small real run of the quick start
#   bash script/test.sh fast                 the edit loop: no test marked slow, at most three cases of a parametrised test
#   bash script/test.sh [fast] ARGUMENT...   passes the arguments to pytest: tests/adapter, -k merge, -x
#
#   WORKERS   processes, one thread each   default: the CPU cores, at most 8
#
# Tests that need the real data look for it in COMMONSENSE_DATA, a folder that holds llm_adapters/, textclass/ and
# glue/. If it is not set they are skipped, and say so.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "${project:-.}"

chosen=()
if [ "${1:-}" = fast ]; then
    chosen=(-m "not slow" --cases 3)
    shift
fi
ruff check .
ruff format --check .
# A test is small; more threads per worker would only take cores from the other workers.
export OMP_NUM_THREADS=1
workers="$(cores)"
workers="${WORKERS:-$((workers < 8 ? workers : 8))}"
unset PYTHONDONTWRITEBYTECODE  # or every worker would rewrite all asserts again
python -m pytest -n "$workers" --dist worksteal ${chosen[@]+"${chosen[@]}"} "$@"
