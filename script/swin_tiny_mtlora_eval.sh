#!/usr/bin/env bash
# Evaluates a checkpoint of script/swin_tiny_mtlora.sh on the test images of a folder, in one process.
#
#   bash script/swin_tiny_mtlora_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
#
# DATA_DIR: folder of PASCAL_MT or NYUD_MT, default data/PASCAL_MT in the project's folder. `--official True` lists the
# values under the original's names. For Delta_m: `mtl-lora report table RESULTS --baselines SINGLE,...`
# (docs/dense.md).
LAUNCHER="${LAUNCHER:-python}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
DATA_DIR="${DATA_DIR:-${project}data/PASCAL_MT}" evaluate_any "$@"
