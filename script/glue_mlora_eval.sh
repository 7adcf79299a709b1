#!/usr/bin/env bash
# Evaluates a checkpoint of script/glue_mlora.sh on data/glue/test (mostly GLUE's dev sets: data/glue/README.md).
#
#   bash script/glue_mlora_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
DATA_DIR="${DATA_DIR:-${project}data/glue/test}" evaluate_any "$@"
