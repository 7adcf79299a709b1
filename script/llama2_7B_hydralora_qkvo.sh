#!/usr/bin/env bash
# HydraLoRA (arXiv 2404.19245): 3 up-projections, a gate on each token; it cannot be merged or exported for PEFT.
# On q/k/v/o of LLaMA-2-7B, with the data, prompt, cutoff and schedule of every row. Needs: see script/recipe.sh.
#
#   bash script/llama2_7B_hydralora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_hydralora_qkvo "$1" "$2" --adapter_name hydralora --num_B "${NUM_B:-3}" "${@:3}"
