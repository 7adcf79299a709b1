#!/usr/bin/env bash
# MultiLoRA (arXiv 2311.11501) on q/k/v/o of LLaMA-2-7B, trained on the commonsense data; n 3. Data, prompt, cutoff and
# schedule are the same in all llama2_7B recipes. Needs, settings, time, score: script/recipe.sh.
#
#   bash script/llama2_7B_multilora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_multilora_qkvo "$1" "$2" --adapter_name multilora --num_B "${NUM_B:-3}" "${@:3}"
