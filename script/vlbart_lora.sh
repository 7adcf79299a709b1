#!/usr/bin/env bash
# LoRA on VL-BART; VL-Adapter (arXiv 2112.06825) uses R 128 and ALPHA 32 and trains 5.93 % of the weights. Biases and
# the visual embedding are trained in full, layer norms are not; batches of 500, warm-up 0.1, dropout 0.1. The published
# captions use 5 beams (BEAMS=5 for the evaluation). Needs, settings, time and score: script/vlbart_mlora.sh.
#
#   bash script/vlbart_lora.sh R ALPHA [flags of mtl-lora train --system image_text]
LAUNCHER="${LAUNCHER:-python}" BATCH_SIZE="${BATCH_SIZE:-500}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train --system image_text]"
train_vlbart vlbart_lora "$1" "$2" --adapter_name lora --lora_dropout "${DROPOUT:-0.1}" \
    --warmup_ratio "${WARMUP:-0.1}" --modules_to_save "*.bias" "${@:3}"
