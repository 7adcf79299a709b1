#!/usr/bin/env bash
# Measures MTL-LoRA on a GPU in at most eight minutes: see benchmark/gpu_report.py.
#
#   bash script/gpu_report.sh OUT [--from N] [--minutes M] [--data DIR] [--dry True]
#
# VENV= (empty) uses the active Python environment, which a machine without network needs (docs/offline.md).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export PYTHONPATH="${project:-$PWD/}src${PYTHONPATH:+:$PYTHONPATH}"
python "${project}benchmark/gpu_report.py" "$@"
