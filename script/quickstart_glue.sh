#!/usr/bin/env bash
# From nothing to a table of GLUE: creates the environment, downloads the encoder minilm-l6 (84 MB) and the data of four
# tasks (SST-2, MRPC, STS-B, QQP), trains heads on the frozen encoder, LoRA, and MTL-LoRA with about as many trainable
# parameters, and evaluates them and the majority class on whole test sets.
#
#   bash script/quickstart_glue.sh
#
# Needs Python 3.11 or newer, bash, pip and about 3 GB of disk. Takes six minutes on 2 CPU cores (avx512, float32)
# without installation and downloads. MRPC needs more steps than fit into eight minutes, so all rows stay at its
# majority class; the notes under the table say so. Everything it writes is under output/quickstart_glue/. OUTPUT,
# MAX_STEPS, LIMIT (questions per task, 0: all) and GLUE_SOURCE (a folder with the files of data/glue/README.md, instead
# of a download) change the run.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out="${OUTPUT:-${project}output/quickstart_glue}"
data="$out/data"
python -m mtl_lora prepare glue --tasks sst2,mrpc,stsb,qqp --output_dir "$data" \
    --download_dir "${project}data/glue/source" ${GLUE_SOURCE:+--source "$GLUE_SOURCE"}

run() {  # run FOLDER NAME ARGUMENT... : train and evaluate
    python -m mtl_lora train --system nlu \
        --base_model minilm-l6 --data_path "$data/train.json" --tasks_file "$data/tasks.json" \
        --output_dir "$out/$1" --cache_dir "$out/cache" --overwrite_output_dir --lora_dropout 0 \
        --batch_size 16 --max_steps "${MAX_STEPS:-350}" --warmup_ratio 0.1 --save_step 0 --logging_steps 50 --seed 42 \
        "${@:3}"
    python -m mtl_lora evaluate --checkpoint "$out/$1" --data_dir "$data/test" --limit "${LIMIT:-0}" --overwrite \
        --name "$2" > /dev/null
}
# Each method learns at its rate, by a few short runs scored on the dev sets (no search). At 1e-3 LoRA learns nothing.
run heads "Heads alone, frozen encoder" --adapter_name none --learning_rate 1e-2
run lora "LoRA" --adapter_name lora --lora_r 25 --lora_alpha 50 --learning_rate 4e-4
run mtl_lora "MTL-LoRA" --adapter_name mtl_lora --lora_r 12 --lora_alpha 24 --num_B 3 --temperature 0.1 \
    --learning_rate 8e-4

python -m mtl_lora report table "$out/heads" "$out/lora" "$out/mtl_lora" | tee "$out/table.md"
