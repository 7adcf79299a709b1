#!/usr/bin/env bash
# MoELoRA (arXiv 2310.18339): 8 experts, task embedding 64; R must be a multiple of the experts.
# On q/k/v/o of LLaMA-2-7B, with the data, prompt, cutoff and schedule of every row. Needs: see script/recipe.sh.
#
#   bash script/llama2_7B_moelora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_moelora_qkvo "$1" "$2" --adapter_name moelora --num_experts "${NUM_EXPERTS:-8}" --task_embedding_dim 64 "${@:3}"
