#!/usr/bin/env bash
# From nothing to a table of questions and statements about images: creates the environment, downloads DINOv2-S,
# SmolLM2-135M and the sets easy-VQA and NLVR, extracts features of some of the images, trains LoRA, and MTL-LoRA with
# about as many trainable parameters, and evaluates them and the majority class on questions of the test sets.
#
#   bash script/quickstart_image_text.sh [--captions]
#
# --captions adds captions of 991 photographs (Flickr8k, for research only; CIDEr). Needs Python 3.11 or newer, bash,
# git, pip and about 4 GB of disk. Takes 15 minutes on two cores (measured: 14:54, avx512 without bf16) once the sets
# are in a folder and the environment exists. docs/image_text.md has the table to expect. From easy-VQA only the
# questions about colors and shapes are used: a text alone can only guess their answers, but answers many yes_no questions.
#
# Everything it writes is under output/quickstart_image_text/; mtl_lora/evaluation/pictures.html shows twelve images
# with the right answer and the model's. An interrupted extraction of features resumes. OUTPUT, TRAIN_IMAGES (per task),
# MAX_STEPS, LIMIT (questions per task, 0: all) and IMAGE_TEXT_SOURCE (a folder with the files of
# data/image_text/README.md, instead of a download) change the run.
case "${1:-}" in
    "") tasks=easy_vqa,nlvr ;;
    --captions) tasks=easy_vqa,nlvr,flickr8k ;;
    *) echo "error: usage: bash script/quickstart_image_text.sh [--captions]" >&2; exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out="${OUTPUT:-${project}output/quickstart_image_text}"
data="$out/data"
python -m mtl_lora prepare image_text --tasks "$tasks" --kinds color,shape --limit "${TRAIN_IMAGES:-600}" --output_dir "$data" \
    --download_dir "${project}data/image_text/source" ${IMAGE_TEXT_SOURCE:+--source "$IMAGE_TEXT_SOURCE"}
# 98 pixels are 7 x 7 patches of 14. The command does nothing if the features of these images exist.
python -m mtl_lora features --model dinov2-small --images "$data/images" --output "$data/features.h5" --size 98 \
    --overwrite

# 2 x 2 visual tokens instead of 7 x 7 make a step faster.
run() {  # run FOLDER NAME ARGUMENT... : train and evaluate
    python -m mtl_lora train --system image_text \
        --base_model smollm2-135m --data_path "$data/train.json" --tasks_file "$data/tasks.json" \
        --features "$data/features.h5" --output_dir "$out/$1" --cache_dir "$out/cache" --overwrite_output_dir \
        --pool 2 --lora_dropout 0 --batch_size 16 --max_steps "${MAX_STEPS:-300}" --learning_rate 5e-4 --warmup_ratio 0.05 \
        --lr_scheduler_type linear --save_step 0 --logging_steps 20 --seed 42 "${@:3}"
    python -m mtl_lora evaluate --checkpoint "$out/$1" --data_dir "$data/test" --limit "${LIMIT:-200}" --overwrite \
        --name "$2" --page 12 --pictures "$data/images" > /dev/null
}
run lora "LoRA" --adapter_name lora --lora_r 13 --lora_alpha 26
run mtl_lora "MTL-LoRA" --adapter_name mtl_lora --lora_r 7 --lora_alpha 14 --num_B 3 --temperature 0.1

# Does the model use the image? Ask the same questions with the images of other questions.
python -m mtl_lora evaluate --checkpoint "$out/mtl_lora" --data_dir "$data/test" --limit "${LIMIT:-200}" --overwrite \
    --shuffle_images --name "MTL-LoRA" > /dev/null

{
    python -m mtl_lora report table "$out/lora" "$out/mtl_lora"
    echo
    python -m mtl_lora report table "$out/mtl_lora/evaluation_shuffled_images"
} | tee "$out/table.md"
