#!/usr/bin/env bash
# Scores a checkpoint of script/glue_mlora.sh on GLUE's dev sets, which are the test sets here.
#
#   bash script/glue_mlora_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
DATA_DIR="${DATA_DIR:-${project}data/glue/test}" evaluate_any "$@"
