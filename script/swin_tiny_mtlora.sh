#!/usr/bin/env bash
# MTLoRA (arXiv 2403.20320) on Swin-T with HRNet's decoders: rank R for the shared part, 4 for each task, every scale 4.
#
#   bash script/swin_tiny_mtlora.sh R [flags of mtl-lora train --system dense]
#
# With R 16, 32 or 64 and the four tasks of PASCAL-Context the trainable parameters are 4,953,146, 6,083,642 or
# 8,344,634. `--downsampler True` gives MTLoRA+. The settings are the original's, but in bf16 or float32 instead of
# fp16: 300 epochs at 448 pixels, global batch 32, AdamW with the rate 5e-4 x batch / 512, weight decay 0.05, warm-up
# for a fifteenth of the steps, then a cosine, clipping at 5. The original's scores as other papers quote them
# (segmentation, parts, saliency, normals): 68.19, 58.99, 64.48, 17.03 with R 16; 67.90, 59.84, 65.40, 16.60 with R 64.
# Time and score of a run here: not measured.
#
#   DATA_PATH      folder of PASCAL_MT or NYUD_MT   default data/PASCAL_MT in the project's folder
#   BASE_MODEL     a Swin or a DINOv2               default microsoft/swin-tiny-patch4-window7-224
#   METHOD         adapter                          default mtlora; also lora, mtl_lora, or none for decoders alone
#   IMAGE_SIZE, BATCH_SIZE (per device), LEARNING_RATE, EPOCHS, WORKERS   default 448, 32, 3.125e-5, 300, 8
#   Other settings: script/recipe.sh. On N devices batch norm is synchronised; divide BATCH_SIZE by N to keep the global
#   batch.
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
[[ "${1:-}" =~ ^[0-9]+$ ]] || usage_if 1 "R [flags of mtl-lora train --system dense]"
train_dense "swin_tiny_${METHOD:-mtlora}" "$1" $((4 * $1)) --adapter_name "${METHOD:-mtlora}" "${@:2}"
