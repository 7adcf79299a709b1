#!/usr/bin/env bash
# DoRA on VL-BART with 128 128 (arXiv 2402.09353).
# Biases, layer norms and the visual embedding train whole; batches of 300, warm-up 0.1. Published with captions of 5
# beams (BEAMS=5 of the evaluation). Needs and settings: see script/vlbart_mlora.sh.
#
#   bash script/vlbart_dora.sh R ALPHA [flags of mtl-lora train --system image_text]
LAUNCHER="${LAUNCHER:-python}" BATCH_SIZE="${BATCH_SIZE:-300}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train --system image_text]"
train_vlbart vlbart_dora "$1" "$2" --adapter_name dora --lora_dropout "${DROPOUT:-0}" --warmup_ratio "${WARMUP:-0.1}" \
    --modules_to_save "*.bias,*layer_norm.weight,*layernorm_embedding.weight" "${@:3}"
