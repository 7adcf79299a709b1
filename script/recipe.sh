# Sourced by the recipes: launches their runs. All recipes of a table take their settings from here, so its rows differ
# only in the method.
#
#   bash script/llama2_7B_<method>_qkvo.sh R ALPHA [flags of mtl-lora train]
#   bash script/llama2_7B_<method>_qkvo_eval.sh CHECKPOINT OUTPUT [flags of mtl-lora evaluate]
#
# Training needs commonsense_170k_taskid.json (data/commonsense/prepare.py), access to LLaMA-2-7B, GPUs that hold it in
# bf16 with 8 rows each (on 24 GiB: BATCH_SIZE=4 ACCUMULATION=2, or --use_gradient_checkpointing True), and main memory
# that holds it once per process. Evaluation needs the test sets (from the same script); the checkpoint names the base
# model, method, rank, prompt and tasks, and the GPUs share the questions. Time and score of the full runs: not
# measured.
#
#   BASE_MODEL    base model                    default meta-llama/Llama-2-7b-hf
#   DATA_PATH     training examples             default commonsense_170k_taskid.json in the project's folder
#   OUTPUT_PATH   adapter and logs              default output/<recipe>_r<R>
#   CACHE_PATH    tokenised data                default .cache/rows
#   DATA_DIR      test sets                     default data/commonsense/test in the project's folder
#   NPROC         processes                     default the number of GPUs; without a GPU, 2 CPU processes
#   LAUNCHER      torchrun, deepspeed, python   default torchrun; python is one process without DeepSpeed
#   BATCH_SIZE    rows per device               default 8
#   ACCUMULATION  micro-batches per step        default 1
#   MAX_STEPS     optimiser steps               default -1: EPOCHS passes
#   EPOCHS, LEARNING_RATE, WARMUP, DROPOUT, TARGETS, MAX_GRAD_NORM, SEED, DTYPE, PORT   see below
#   CUTOFF_LEN, DEEPSPEED   see below; not for swin_tiny_mtlora.sh, which has no texts and runs without DeepSpeed
#   NUM_B, TEMPERATURE, NUM_EXPERTS   for the methods that have them
#   MODE          generate, score or both       default generate (evaluation)
#   EVAL_BATCH_SIZE  questions per device       default auto (evaluation)

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

LAUNCHER="${LAUNCHER:-torchrun}"
DEEPSPEED="${DEEPSPEED-$([ "$LAUNCHER" = python ] || echo config/zero2.json)}"

# For recipes that take any METHOD; recipes of one method pass these flags themselves.
method_flags=(${NUM_B:+--num_B "$NUM_B"} ${TEMPERATURE:+--temperature "$TEMPERATURE"}
    ${NUM_EXPERTS:+--num_experts "$NUM_EXPERTS"})

usage_if() {  # usage_if CONDITION TEXT : if the condition is not 0, print the usage and exit with code 2
    if [ "$1" -ne 0 ]; then echo "usage: bash $0 $2" >&2; exit 2; fi
}

count_processes() {  # sets gpus and NPROC
    if [ "$LAUNCHER" = python ]; then NPROC=1; return; fi
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    NPROC="${NPROC:-$([ "$gpus" -gt 0 ] && echo "$gpus" || echo 2)}"
}

launch() {  # launch SCRIPT ARGUMENT... : check the arguments in one process, then run in NPROC processes
    if [ "$LAUNCHER" = python ]; then python "$@"; return; fi
    # A launcher would hide the error and exit code of a user's mistake behind its own traceback.
    python "$@" --check True
    local threads
    count_processes
    if [ "$gpus" -eq 0 ]; then
        echo "note: torch finds no GPU; running $NPROC processes on the CPU" >&2
        export DS_ACCELERATOR=cpu
        # The processes share the cores; without this, each would start one thread per core.
        threads=$(($(cores) / NPROC))
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
    fi
    case "$LAUNCHER" in
        torchrun) torchrun --nproc_per_node "$NPROC" --master_port "${PORT:-29500}" "$@" ;;
        deepspeed) deepspeed --num_gpus "$NPROC" --master_port "${PORT:-29500}" "$@" ;;
        *) echo "error: LAUNCHER must be torchrun, deepspeed or python, not $LAUNCHER" >&2; exit 2 ;;
    esac
}

train() {  # train RECIPE R ALPHA ARGUMENT...
    train_any "$@" \
        --base_model "${BASE_MODEL:-meta-llama/Llama-2-7b-hf}" \
        --data_path "${DATA_PATH:-${project}commonsense_170k_taskid.json}" \
        --lora_target_modules "${TARGETS:-q_proj,k_proj,v_proj,o_proj}" --lora_dropout "${DROPOUT:-0.05}" \
        --batch_size "${BATCH_SIZE:-8}" --learning_rate "${LEARNING_RATE:-3e-4}" --warmup_ratio "${WARMUP:-0.01}" \
        --cutoff_len "${CUTOFF_LEN:-256}"
}

train_glue() {  # train_glue RECIPE R ALPHA ARGUMENT... : with the rate that the GLUE study chose for the METHOD
    local rate
    case "${METHOD:-mtl_lora}" in
        lora | dora | hydralora) rate=4e-4 ;;  # at MTL-LoRA's rate they learn little or nothing
        multilora) rate=1.6e-3 ;;
        *) rate=8e-4 ;;  # for moelora half the chosen rate, at which one seed of five learned nothing
    esac
    train_any "$@" --system nlu ${method_flags[@]+"${method_flags[@]}"} \
        --base_model "${BASE_MODEL:-minilm-l6}" \
        --data_path "${DATA_PATH:-${project}data/glue/train.json}" \
        --tasks_file "${TASKS_FILE:-${project}data/glue/tasks.json}" \
        --lora_target_modules "${TARGETS:-all-linear}" --lora_dropout "${DROPOUT:-0}" \
        --batch_size "${BATCH_SIZE:-32}" --learning_rate "${LEARNING_RATE:-$rate}" --warmup_ratio "${WARMUP:-0.06}" \
        --cutoff_len "${CUTOFF_LEN:-128}"
}

train_dense() {  # train_dense RECIPE R ALPHA ARGUMENT... : without DeepSpeed, because the base model is small
    DEEPSPEED=none MAX_GRAD_NORM="${MAX_GRAD_NORM:-5.0}" EPOCHS="${EPOCHS:-300}" train_any "$@" --system dense \
        ${method_flags[@]+"${method_flags[@]}"} \
        ${WARMUP:+--warmup_ratio "$WARMUP"} ${TARGETS:+--lora_target_modules "$TARGETS"} \
        --base_model "${BASE_MODEL:-microsoft/swin-tiny-patch4-window7-224}" \
        --data_path "${DATA_PATH:-${project}data/PASCAL_MT}" --image_size "${IMAGE_SIZE:-448}" \
        --lora_dropout "${DROPOUT:-0.05}" --drop_path "${DROP_PATH:-0.2}" \
        --batch_size "${BATCH_SIZE:-32}" --learning_rate "${LEARNING_RATE:-3.125e-5}" --workers "${WORKERS:-8}"
}

train_vlbart() {  # train_vlbart RECIPE R ALPHA ARGUMENT... : a step of VQA has b examples, other tasks in proportion
    local b="${BATCH_SIZE:-512}" parts features="" folder
    count_processes
    parts=$((${ACCUMULATION:-1} * NPROC))
    for folder in COCO VG GQA nlvr; do
        features+="${features:+,}${DATASETS:-datasets}/$folder/clip_features/data_clip_RN101_att"
    done
    EPOCHS="${EPOCHS:-20}" MAX_GRAD_NORM="${MAX_GRAD_NORM:-5}" SEED="${SEED:-9595}" DTYPE="${DTYPE:-fp32}"
    train_any "$@" --system image_text \
        --base_model "${BASE_MODEL:-facebook/bart-base}" \
        --data_path "${DATA_PATH:-${project}data/vlbart/train.json}" \
        --tasks_file "${TASKS_FILE:-${project}data/vlbart/tasks.json}" \
        --features "${FEATURES:-$features}" --pool "${POOL:-6}" \
        --lora_target_modules "${TARGETS:-q_proj,v_proj}" ${CUTOFF_LEN:+--cutoff_len "$CUTOFF_LEN"} \
        --task_batches round_robin --batch_size $((b / parts)) \
        --task_batch_sizes "gqa=$((b * 100 / 60 / parts)),nlvr=$((b * 20 / 60 / parts)),caption=$((b * 50 / 60 / parts))" \
        --learning_rate "${LEARNING_RATE:-1e-3}" --weight_decay 0.01
}

train_any() {  # train_any RECIPE R ALPHA ARGUMENT... : with the settings that all recipes share
    local recipe="$1" rank="$2" alpha="$3"
    launch "${project}finetune.py" "${@:4}" \
        --output_dir "${OUTPUT_PATH:-output/${recipe}_r${rank}}" \
        --cache_dir "${CACHE_PATH:-.cache/rows}" \
        --lora_r "$rank" --lora_alpha "$alpha" \
        --gradient_accumulation_steps "${ACCUMULATION:-1}" \
        --num_epochs "${EPOCHS:-3}" --max_steps "${MAX_STEPS:--1}" --max_grad_norm "${MAX_GRAD_NORM:-1.0}" \
        --seed "${SEED:-42}" --dtype "${DTYPE:-auto}" \
        --deepspeed "$DEEPSPEED"
}

evaluate_any() {  # evaluate_any CHECKPOINT OUTPUT ARGUMENT... : any system, on the test sets in DATA_DIR
    usage_if $(($# < 2)) "CHECKPOINT OUTPUT [flags of mtl-lora evaluate]"
    local checkpoint="$1" output="$2"
    shift 2
    launch "${project}commonsense_evaluate.py" \
        --checkpoint "$checkpoint" --output_dir "$output" --data_dir "$DATA_DIR" \
        --batch_size "${EVAL_BATCH_SIZE:-auto}" --dtype "${DTYPE:-auto}" \
        ${BASE_MODEL:+--base_model "$BASE_MODEL"} \
        "$@"
}

evaluate() {  # evaluate CHECKPOINT OUTPUT ARGUMENT...
    DATA_DIR="${DATA_DIR:-${project}data/commonsense/test}"
    evaluate_any "${@:1:2}" --mode "${MODE:-generate}" "${@:3}"
}
