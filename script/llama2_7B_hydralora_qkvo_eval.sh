#!/usr/bin/env bash
# Scores a checkpoint of script/llama2_7B_hydralora_qkvo.sh; script/recipe.sh says what it needs.
#
#   bash script/llama2_7B_hydralora_qkvo_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
evaluate "$@"
