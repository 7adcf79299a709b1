#!/usr/bin/env bash
# What a GPU does with MTL-LoRA, in at most eight minutes: see benchmark/gpu_report.py.
#
#   bash script/gpu_report.sh OUT [--from N] [--minutes M] [--data DIR] [--dry True]
#
# VENV= (empty) uses the Python environment that is active, as a node without network needs it (docs/offline.md).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export PYTHONPATH="${project:-$PWD/}src${PYTHONPATH:+:$PYTHONPATH}"
python "${project}benchmark/gpu_report.py" "$@"
