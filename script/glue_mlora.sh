#!/usr/bin/env bash
# MTL-LoRA on GLUE: one encoder, an adapter on its linear layers, a head per task, mixed batches of all tasks.
#
#   bash script/glue_mlora.sh R ALPHA [flags of mtl-lora train --system nlu]
#
# Needs data/glue (data/glue/prepare.py). With `12 24` and the defaults below it trains 1,037,664 weights of the adapter,
# as the studies do (docs/studies); METHOD takes any other method. Other settings: script/recipe.sh.
#
#   BASE_MODEL     encoder                       default minilm-l6, which is fetched
#   DATA_PATH, TASKS_FILE   examples and tasks   default data/glue/{train,tasks}.json in the project's folder
#   METHOD         adapter                       default mtl_lora
#   LEARNING_RATE  of 32 rows a step             default by method: 4e-4 to 1.6e-3
source "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
usage_if $(($# < 2)) "R ALPHA [flags of mtl-lora train --system nlu]"
train_glue "glue_${METHOD:-mtl_lora}" "$1" "$2" --adapter_name "${METHOD:-mtl_lora}" "${@:3}"
