#!/usr/bin/env bash
# MTL-LoRA, the paper's setting with 8 16 (arXiv 2410.09437): n 3, tau 0.1, 3 epochs of the 170k set.
# On q/k/v/o of LLaMA-2-7B, with the data, prompt, cutoff and schedule of every row. Needs: see script/recipe.sh.
#
#   bash script/llama2_7B_mlora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_mlora_qkvo "$1" "$2" --adapter_name mtl_lora --num_B "${NUM_B:-3}" --temperature "${TEMPERATURE:-0.1}" "${@:3}"
