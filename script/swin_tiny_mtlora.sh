#!/usr/bin/env bash
# MTLoRA (arXiv 2403.20320) on Swin-T: rank R of what tasks share, 4 of each task's own, every scale 4; decoders of HRNet.
#
#   bash script/swin_tiny_mtlora.sh R [flags of mtl-lora train --system dense]
#
# With 16, 32 or 64 and the four tasks of PASCAL-Context it trains 4,953,146, 6,083,642 or 8,344,634 weights; MTLoRA+ is
# the flag `--downsampler True`. The original's settings: 300 epochs at 448 pixels, global batch 32, AdamW with the rate
# 5e-4 x batch / 512, weight decay 0.05, a fifteenth of it warm-up, a cosine, clipping at 5; here in bf16 or float32
# instead of its fp16. Its rows as other papers quote them (segmentation, parts, saliency, normals): with 16 68.19, 58.99,
# 64.48, 17.03; with 64 67.90, 59.84, 65.40, 16.60. Time and score of a run here: not measured.
#
#   DATA_PATH      folder of PASCAL_MT or NYUD_MT   default data/PASCAL_MT in the project's folder
#   BASE_MODEL     a Swin or a DINOv2               default microsoft/swin-tiny-patch4-window7-224
#   METHOD         adapter                          default mtlora; lora, mtl_lora, or none for decoders alone
#   IMAGE_SIZE, BATCH_SIZE (per device), LEARNING_RATE, EPOCHS, WORKERS   default 448, 32, 3.125e-5, 300, 8
#   Others: script/recipe.sh. With N devices batch norm is synchronised; divide BATCH_SIZE by N to keep the global batch.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
[[ "${1:-}" =~ ^[0-9]+$ ]] || usage_if 1 "R [flags of mtl-lora train --system dense]"
train_dense "swin_tiny_${METHOD:-mtlora}" "$1" $((4 * $1)) --adapter_name "${METHOD:-mtlora}" "${@:2}"
