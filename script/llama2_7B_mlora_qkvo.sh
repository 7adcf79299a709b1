#!/usr/bin/env bash
# MTL-LoRA on q/k/v/o of LLaMA-2-7B, the paper's setting (arXiv 2410.09437): n 3, tau 0.1, 3 epochs of the 170k set.
#
#   bash script/llama2_7B_mlora_qkvo.sh R ALPHA [flags of finetune.py]      the paper: 8 16
#
# Needs: commonsense_170k_taskid.json (data/commonsense/prepare.py), access to LLaMA-2-7B, and GPUs that hold it in bf16
# with 8 rows each. Time and expected score of the full run: not measured. script/recipe.sh lists the environment
# variables that override a setting.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of finetune.py]"
train llama2_7B_mlora_qkvo "$1" "$2" --adapter_name mtl_lora --num_B "${NUM_B:-3}" --temperature "${TEMPERATURE:-0.1}" "${@:3}"
