#!/usr/bin/env bash
# MoELoRA (arXiv 2310.18339) on q/k/v/o of LLaMA-2-7B, trained on the commonsense data. 8 experts and a task embedding
# of 64; R must be a multiple of the number of experts. Data, prompt, cutoff and schedule are the same in all llama2_7B
# recipes. Needs, settings, time, score: script/recipe.sh.
#
#   bash script/llama2_7B_moelora_qkvo.sh R ALPHA [flags of mtl-lora train]
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train]"
train llama2_7B_moelora_qkvo "$1" "$2" --adapter_name moelora --num_experts "${NUM_EXPERTS:-8}" --task_embedding_dim 64 "${@:3}"
