#!/usr/bin/env bash
# Lint and all tests. Makes or reuses the environment; further arguments go to pytest.
#
# Tests that need the real data find it through COMMONSENSE_DATA (a folder that holds llm_adapters/ and textclass/)
# and are skipped, with that reason, where it is not set.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check .
python -m pytest "$@"
