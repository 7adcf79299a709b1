#!/usr/bin/env bash
# HydraLoRA (arXiv 2404.19245) on q/k/v/o of LLaMA-2-7B, trained on the commonsense data. 3 up-projections and a gate
# per token; the adapter cannot be merged or exported to PEFT. Data, prompt, cutoff and schedule are the same in all
# llama2_7B recipes. Needs, settings, time, score: script/recipe.sh.
#
#   bash script/llama2_7B_hydralora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_hydralora_qkvo "$1" "$2" --adapter_name hydralora --num_B "${NUM_B:-3}" "${@:3}"
