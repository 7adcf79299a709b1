#!/usr/bin/env bash
# Evaluates a checkpoint of script/llama2_7B_hydralora_qkvo.sh on the commonsense test sets. Needs and settings:
# script/recipe.sh.
#
#   bash script/llama2_7B_hydralora_qkvo_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
evaluate "$@"
