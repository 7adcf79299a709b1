#!/usr/bin/env bash
# HydraLoRA (arXiv 2404.19245, 3 up-projections, a gate on each token) on q/k/v/o of LLaMA-2-7B, with the data, prompt,
# cutoff and schedule of every other row. Its adapter needs no task ids, and equals no plain LoRA: it can neither be
# merged nor exported for PEFT.
#
#   bash script/llama2_7B_hydralora_qkvo.sh R ALPHA [flags of finetune.py]
#
# Needs: what script/llama2_7B_mlora_qkvo.sh needs. Time and expected score of the full run: not measured.
# script/recipe.sh lists the environment variables that override a setting.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of finetune.py]"
train llama2_7B_hydralora_qkvo "$1" "$2" --adapter_name hydralora --num_B "${NUM_B:-3}" "${@:3}"
