#!/usr/bin/env bash
# MTL-LoRA (arXiv 2410.09437) on q/k/v/o of LLaMA-2-7B, trained on the commonsense data. With R 8 and ALPHA 16 this is
# the paper's setting: n 3, tau 0.1, 3 epochs of the 170k set. Data, prompt, cutoff and schedule are the same in all
# llama2_7B recipes. Needs, settings, time, score: script/recipe.sh.
#
#   bash script/llama2_7B_mlora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_mlora_qkvo "$1" "$2" --adapter_name mtl_lora --num_B "${NUM_B:-3}" --temperature "${TEMPERATURE:-0.1}" "${@:3}"
