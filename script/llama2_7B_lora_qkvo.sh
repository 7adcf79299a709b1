#!/usr/bin/env bash
# LoRA (arXiv 2106.09685) on q/k/v/o of LLaMA-2-7B, with the data, prompt, cutoff and schedule of every other row.
#
#   bash script/llama2_7B_lora_qkvo.sh R ALPHA [flags of finetune.py]
#
# Needs: what script/llama2_7B_mlora_qkvo.sh needs. Time and expected score of the full run: not measured.
# script/recipe.sh lists the environment variables that override a setting.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of finetune.py]"
train llama2_7B_lora_qkvo "$1" "$2" --adapter_name lora "${@:3}"
