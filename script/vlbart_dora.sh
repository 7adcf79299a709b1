#!/usr/bin/env bash
# DoRA on VL-BART; its paper (arXiv 2402.09353) uses R 128 and ALPHA 128. Biases, layer norms and the visual embedding
# are trained in full; batches of 300, warm-up 0.1. The published captions use 5 beams (BEAMS=5 for the evaluation).
# The published training also sends the gradient through DoRA's norm, and decays its magnitude; here neither is done.
# Needs, settings, time and score: script/vlbart_mlora.sh.
#
#   bash script/vlbart_dora.sh R ALPHA [flags of mtl-lora train --system image_text]
LAUNCHER="${LAUNCHER:-python}" BATCH_SIZE="${BATCH_SIZE:-300}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train --system image_text]"
train_vlbart vlbart_dora "$1" "$2" --adapter_name dora --lora_dropout "${DROPOUT:-0}" --warmup_ratio "${WARMUP:-0.1}" \
    --modules_to_save "*.bias,*layer_norm.weight,*layernorm_embedding.weight" "${@:3}"
