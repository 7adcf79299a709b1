#!/usr/bin/env bash
# From nothing to a table and an image sheet of dense tasks: creates the environment, downloads dinov2-small (90 MB),
# renders scenes at 112 pixels, trains segmentation, depth and normals together in three ways (decoders on the frozen
# backbone, LoRA, MTLoRA), and evaluates them. Delta_m is relative to the decoders alone.
#
#   bash script/quickstart_dense.sh
#
# Needs Python 3.11 or newer, bash, pip and about 3 GB of disk. Without installation and download it takes eight minutes
# on 2 CPU cores with bf16, and 22 on one core without bf16 beside other work. Everything it writes is under
# output/quickstart_dense/; <run>/evaluation/sheet.png shows images, labels and predicted maps. OUTPUT, TRAIN_IMAGES,
# TEST_IMAGES, MAX_STEPS and TASKS (of semseg, depth, normals, sal, edge) change the run.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out="${OUTPUT:-${project}output/quickstart_dense}"
data="$out/data"
python -m mtl_lora prepare scenes --train "${TRAIN_IMAGES:-400}" --test "${TEST_IMAGES:-100}" --size 112 \
    --output_dir "$data" --overwrite

run() {  # run FOLDER NAME ARGUMENT... : train and evaluate
    python -m mtl_lora train --system dense \
        --base_model dinov2-small --data_path "$data" --tasks "${TASKS:-semseg,depth,normals}" --image_size 112 \
        --output_dir "$out/$1" --overwrite_output_dir --lora_dropout 0 --batch_size 8 \
        --max_steps "${MAX_STEPS:-200}" --learning_rate 1e-3 --warmup_ratio 0.05 --save_step 0 --logging_steps 20 \
        --seed 42 "${@:3}"
    python -m mtl_lora evaluate --checkpoint "$out/$1" --data_dir "$data" --overwrite --name "$2" --sheet 6 > /dev/null
}
# LoRA has one low-rank pair for all tasks; MTLoRA adds a pair for each task in the last block of each stage. Norms and
# patch embedding train by default; at this rate that would destroy what they know, and the loss would stay high.
adapter=(--lora_r 16 --lora_alpha 16 --train_extras False)
run decoders "Decoders alone, frozen backbone" --adapter_name none
run lora "LoRA, shared by all tasks" --adapter_name lora "${adapter[@]}"
run mtlora "MTLoRA" --adapter_name mtlora --task_scale 1 "${adapter[@]}"

python -m mtl_lora report table "$out/decoders" "$out/lora" "$out/mtlora" --baselines "$out/decoders" |
    tee "$out/table.md"
