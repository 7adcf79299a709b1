#!/usr/bin/env bash
# MTL-LoRA on VL-BART: 20 epochs of VQAv2, GQA, NLVR2 and COCO captions, with n 2 and tau 0.8 (arXiv 2410.09437). The
# paper's setting is R 64 and ALPHA 16.
#
#   bash script/vlbart_mlora.sh R ALPHA [flags of mtl-lora train --system image_text]
#
# Adapts the queries and values of BART-base; biases, layer norms and the visual embedding are trained in full. Each
# step has examples of one task: BATCH_SIZE for VQA, 100/60 of that for GQA, 20/60 for NLVR2 and 50/60 for captions.
# Needs the four sets (data/vlbart) with CLIP features in the original's layout; runs in fp32 on one GPU. Time and
# score: not measured. What differs from the original: docs/image_text.md. Other settings: script/recipe.sh.
#
#   BASE_MODEL     facebook/bart-base, or another BART, T5 or causal language model
#   DATASETS       folder with COCO, VG, GQA and nlvr      default datasets; FEATURES names the features directly
#   DATA_PATH, TASKS_FILE   examples and tasks             default data/vlbart/{train,tasks}.json
#   BATCH_SIZE     examples in a step of VQA               default 512; divided by ACCUMULATION and NPROC
#   LAUNCHER       python or torchrun                      default python: one process
LAUNCHER="${LAUNCHER:-python}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train --system image_text]"
train_vlbart vlbart_mlora "$1" "$2" --adapter_name mtl_lora --num_B "${NUM_B:-2}" --temperature "${TEMPERATURE:-0.8}" \
    --lora_dropout "${DROPOUT:-0}" --warmup_ratio "${WARMUP:-0.03}" \
    --modules_to_save "*.bias,*layer_norm.weight,*layernorm_embedding.weight" "${@:3}"
