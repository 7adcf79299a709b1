#!/usr/bin/env bash
# Scores a checkpoint of script/llama2_7B_hydralora_qkvo.sh on the eight test sets; the questions are shared by the GPUs
# there are. The checkpoint itself says base model, method, rank, prompt and tasks.
#
#   bash script/llama2_7B_hydralora_qkvo_eval.sh CHECKPOINT OUTPUT [flags of commonsense_evaluate.py]
#
# Needs: the test sets (data/commonsense/prepare.py). Time and expected score of the full run: not measured.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "CHECKPOINT OUTPUT [flags of commonsense_evaluate.py]"
evaluate "$@"
