#!/usr/bin/env bash
# Evaluates a checkpoint of script/vlbart_*.sh on VQAv2, GQA (testdev), NLVR2 (test-P) and COCO captions (Karpathy's
# test split). Labels are chosen as in the original.
#
#   bash script/vlbart_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
#
#   BEAMS          beams for captions   default 1, as in MTL-LoRA's code; VL-Adapter's and DoRA's rows use 5. Compare a
#                  CIDEr only with one of the same number of beams
#   OFFICIAL       choose labels as the original does   default True; False for a causal language model, which has none
#   DATA_DIR       test sets            default data/vlbart/test
#   FEATURES       image features       default the paths of the training
LAUNCHER="${LAUNCHER:-python}" DTYPE="${DTYPE:-fp32}"
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "CHECKPOINT OUTPUT [flags of mtl-lora evaluate]"
DATA_DIR="${DATA_DIR:-${project}data/vlbart/test}"
evaluate_any "$@" --num_beams "${BEAMS:-1}" --official "${OFFICIAL:-True}" ${FEATURES:+--features "$FEATURES"}
