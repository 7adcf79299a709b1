#!/usr/bin/env bash
# MTL-LoRA on GLUE: one encoder with an adapter on its linear layers, a head per task, batches that mix all tasks.
#
#   bash script/glue_mlora.sh R ALPHA [flags of mtl-lora train --system nlu]
#
# Needs data/glue (data/glue/prepare.py). With R 12, ALPHA 24 and the defaults below the adapter has 1,037,664 trainable
# parameters, as in the studies (docs/studies, which has the scores). Other settings: script/recipe.sh.
#
#   BASE_MODEL     encoder                       default minilm-l6, which is downloaded
#   DATA_PATH, TASKS_FILE   examples and tasks   default data/glue/{train,tasks}.json in the project's folder
#   METHOD         adapter                       default mtl_lora; any method
#   LEARNING_RATE  for steps of 32 rows          default by method: 4e-4 to 1.6e-3
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train --system nlu]"
train_glue "glue_${METHOD:-mtl_lora}" "$1" "$2" --adapter_name "${METHOD:-mtl_lora}" "${@:3}"
