#!/usr/bin/env bash
# Scores a checkpoint of script/vlbart_*.sh: VQAv2, GQA (testdev), NLVR2 (test-P), COCO captions (Karpathy's test split).
# Labels are chosen as the original does.
#
#   bash script/vlbart_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
#
#   BEAMS          beams for captions   default 1, as the code of MTL-LoRA; VL-Adapter's and DoRA's rows have 5: a CIDEr
#                  is compared with one of the same number alone
#   OFFICIAL       labels as the original chooses them   default True; False for a causal language model, which has none
#   DATA_DIR       test sets            default data/vlbart/test
#   FEATURES       default those of the training, where they lay then
LAUNCHER="${LAUNCHER:-python}" DTYPE="${DTYPE:-fp32}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "CHECKPOINT OUTPUT [flags of mtl-lora evaluate]"
DATA_DIR="${DATA_DIR:-${project}data/vlbart/test}"
evaluate_any "$@" --num_beams "${BEAMS:-1}" --official "${OFFICIAL:-True}" ${FEATURES:+--features "$FEATURES"}
