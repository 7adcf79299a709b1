#!/usr/bin/env bash
# DoRA (arXiv 2402.09353) on q/k/v/o of LLaMA-2-7B, trained on the commonsense data. Data, prompt, cutoff and schedule
# are the same in all llama2_7B recipes. Needs, settings, time, score: script/recipe.sh.
#
#   bash script/llama2_7B_dora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_dora_qkvo "$1" "$2" --adapter_name dora "${@:3}"
