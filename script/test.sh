#!/usr/bin/env bash
# Lint and tests in parallel workers. Makes or reuses the environment.
#
#   bash script/test.sh                      everything, with a small real run of the quick start among it
#   bash script/test.sh fast                 the edit loop: without the tests that are marked slow
#   bash script/test.sh [fast] ARGUMENT...   the arguments go to pytest: tests/adapter, -k merge, -x
#
#   WORKERS   processes, one thread each   default: the CPU cores, at most 8
#
# Tests that need the real data find it through COMMONSENSE_DATA (a folder that holds llm_adapters/, textclass/ and glue/)
# and are skipped, with that reason, where it is not set.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "${project:-.}"

chosen=()
if [ "${1:-}" = fast ]; then
    chosen=(-m "not slow")
    shift
fi
ruff check .
ruff format --check .
# A test is small: threads of its own would only take the cores from the other workers.
export OMP_NUM_THREADS=1
workers="$(cores)"
workers="${WORKERS:-$((workers < 8 ? workers : 8))}"
python -m pytest -n "$workers" --dist worksteal ${chosen[@]+"${chosen[@]}"} "$@"
