"""Bad input of encoders: exit code 2 and one sentence with the facts, nothing written; and odd input that is right."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from good_inputs import FIXTURES, assert_refused, ended, run, write
from nlu_cases import LABELLED, examples
from safetensors.torch import load_file, save_file

TONE, CLOSENESS, PLACE = (examples(task, 1)[0] for task in LABELLED)

# An example in a file between two good ones -> facts of the sentence; none where it is right.
EXAMPLES = {
    "label of another task": (TONE | {"label": "sea"}, ["example 1", "'sea'", "tone", "sad, glad"]),
    "number of no label": (TONE | {"label": 2}, ["example 1", "2", "sad, glad"]),
    "label true": (TONE | {"label": True}, ["True", "sad, glad"]),
    "label a list": (TONE | {"label": ["sad"]}, ["['sad']"]),
    "no label": (TONE | {"label": None}, ["example 1", "'label'"]),
    "number of a label": (TONE | {"label": 1}, []),
    "below the range": (CLOSENESS | {"label": 0.9}, ["example 1", "0.9", "1 to 5", "closeness"]),
    "not a number": (CLOSENESS | {"label": float("nan")}, ["example 1", "nan", "1 to 5"]),
    "infinite": (CLOSENESS | {"label": "inf"}, ["'inf'", "1 to 5"]),
    "a word for a number": (CLOSENESS | {"label": "much"}, ["'much'", "1 to 5"]),
    "true for a number": (CLOSENESS | {"label": True}, ["example 1", "True", "1 to 5"]),
    "a list for a number": (CLOSENESS | {"label": [3]}, ["example 1", "[3]", "1 to 5"]),
    "end of the range as a word": (CLOSENESS | {"label": "5"}, []),
    "unknown task": (TONE | {"task": "mood"}, ["example 1", "'mood'", "tone 0"]),
    "no text": (TONE | {"text": " \t"}, ["example 1", "'text' is empty"]),
    "text of no token": (TONE | {"text": "\u200b"}, []),
    "text a number": (TONE | {"text": 5}, ["'text'", "a string"]),
    "second text misspelt": (
        {"textB" if key == "text_b" else key: PLACE[key] for key in PLACE},
        ["'textB'", "did you mean 'text_b'"],
    ),
    "second text by another name": (
        {"text_pair" if key == "text_b" else key: PLACE[key] for key in PLACE},
        ["'text_pair'", "did you mean 'text_b'"],
    ),
    "second text as MNLI calls it": (
        {"hypothesis" if key == "text_b" else key: PLACE[key] for key in PLACE},
        ["'hypothesis'", "did you mean 'text_b'"],
    ),
    "second text a number": (PLACE | {"text_b": 5}, ["'text_b'", "a string"]),
    "second text empty": (PLACE | {"text_b": ""}, []),
    "very long": (PLACE | {"text": "bab " * 3000, "text_b": "bek " * 2000}, []),
}
# Changes of the first task -> facts.
TASKS = {
    "labels and regression": ({"regression": [0, 1]}, ["'tone'", "either", "regression"]),
    "neither": ({"labels": None}, ["'tone'", "either", "regression"]),
    "range reversed": ({"labels": None, "regression": [5, 1]}, ["'tone'", "[5, 1]", "[low, high]"]),
    "range of words": ({"labels": None, "regression": ["a", "b"]}, ["'tone'", "[low, high]"]),
    "range beyond numbers": ({"labels": None, "regression": [0, 10**400]}, ["'tone'", "[low, high]"]),
    "range not a number": ({"labels": None, "regression": [0, float("nan")]}, ["'tone'", "[low, high]"]),
    "one label": ({"labels": ["sad"]}, ["'tone'", "two different labels"]),
    "metric of numbers": ({"metric": "pearson"}, ["'pearson'", "matthews"]),
}
ALONE = "evaluate --checkpoint= --system=nlu --base_model=encoder --tasks_file=tasks.json"
# A command line, completed, -> facts.
LINES = {
    "cutoff beyond the positions": ("train --cutoff_len=64", ["40 positions", "--cutoff_len 64"]),
    "cutoff below a token": ("train --cutoff_len=3", ["cutoff_len", "4"]),
    "no such layer": ("train --lora_target_modules=q_proj", ["--lora_target_modules", "'q_proj'", "query"]),
    "no tasks file": ("train --tasks_file=none.json", ["none.json"]),
    "encoder as a language model": ("train --system=language", ["--system nlu"]),
    "encoder-decoder": ("train --base_model=t5", ["encoder-decoder"]),
    "another system": ("evaluate --system=language", ["nlu", "--system language"]),
    "checkpoint of another system": ("evaluate --system=nlu --checkpoint=language", ["language", "--system"]),
    "tasks of the checkpoint": ("evaluate --tasks_file=tasks.json", ["--tasks_file", "--checkpoint"]),
    "cutoff of the checkpoint": ("evaluate --cutoff_len=9", ["--cutoff_len", "--checkpoint"]),
    "unknown task": ("evaluate --tasks=mood", ["'mood'", "tone 0"]),
    "no examples of a task": ("evaluate --data_dir=empty", ["empty/tone/test.json", "no examples"]),
    "label in a test set": ("evaluate --data_dir=wrong", ["wrong/tone/test.json, example 0", "'angry'"]),
    "class without a checkpoint": (f"{ALONE} --tasks=place", ["regression tasks on pairs", "place is not one"]),
    "single texts without a checkpoint": (
        f"{ALONE} --tasks=closeness --data_dir=unpaired",
        ["regression tasks on pairs", "closeness is not one"],
    ),
    "no head of a task": ("evaluate --checkpoint=headless", ["headless", "classifier.1.weight"]),
    "head of another size": ("evaluate --checkpoint=narrow", ["narrow", "classifier.0.weight"]),
    "prediction of no task": ("predict --input=test/tone/unnamed.json", ["example 0", "'task_id'", "tone 0"]),
    "pair without its second text": (
        "predict --input=test/place/alone.json",
        ["alone.json, example 1", "'sentence2'", "did you mean 'text_b'"],
    ),
    "second text of a single one": ("predict --input=test/tone/pair.json", ["example 0", "a 'text_b'", "tone"]),
    "prediction without a head": (
        "predict --checkpoint= --system=nlu --base_model=encoder --tasks_file=tasks.json",
        ["--checkpoint"],
    ),
}
DEFAULTS = {
    "train": "--system=nlu --base_model=encoder --tasks_file=tasks.json --data_path=train.json --output_dir=out "
    "--cutoff_len=32 --check=True",
    "evaluate": "--checkpoint=ck --data_dir=test --output_dir=out --dtype=fp32",
    "predict": "--checkpoint=ck --input=test/tone/test.json --output=out --dtype=fp32",
}


@pytest.fixture(scope="module")
def inputs(trained, encoder, glue, tmp_path_factory) -> Path:
    """A folder with small valid inputs, and some broken ones."""
    folder = tmp_path_factory.mktemp("inputs") / "inputs"
    shutil.copytree(glue, folder)
    shutil.copytree(trained, folder / "ck")
    shutil.copytree(encoder, folder / "encoder")
    shutil.copytree(FIXTURES / "checkpoints" / "mtl_lora", folder / "language")
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 60}
    write(folder / "t5" / "config.json", {"model_type": "t5", **sizes})
    write(folder / "test" / "tone" / "unnamed.json", [{"text": "bab"}])
    write(folder / "test" / "tone" / "pair.json", [TONE | {"text_b": "bab"}])
    write(folder / "test" / "place" / "alone.json", [PLACE, {"text": "bab", "sentence2": "bek", "task": "place"}])
    for name, content in {"empty": [], "wrong": [TONE | {"label": "angry"}]}.items():
        shutil.copytree(folder / "test", folder / name)
        write(folder / name / "tone" / "test.json", content)
    write(folder / "unpaired" / "closeness" / "test.json", [{**CLOSENESS, "text_b": None}])
    broken(folder, "headless", {"classifier.1.weight": None, "classifier.1.bias": None})
    broken(folder, "narrow", {"classifier.0.weight": slice(0, 1)})
    return folder


def broken(folder: Path, name: str, changes: dict) -> None:
    """A checkpoint with weights that are cut or left out, and their hash."""
    shutil.copytree(folder / "ck", folder / name)
    path, config = folder / name / "mtl_lora.safetensors", folder / name / "mtl_lora_config.json"
    before, state = hashlib.sha256(path.read_bytes()).hexdigest(), load_file(path)
    kept = {key: tensor for key, tensor in state.items() if key not in changes or changes[key] is not None}
    save_file({key: tensor[changes.get(key) or slice(None)].clone() for key, tensor in kept.items()}, path)
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, hashlib.sha256(path.read_bytes()).hexdigest()))


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, inputs, monkeypatch, tmp_path):
    example, facts = EXAMPLES[name]
    write(tmp_path / "d.json", [TONE, example, PLACE])
    done = ended(
        f"train --data_path={tmp_path / 'd.json'} --cache_dir={tmp_path / 'cache'}", inputs, monkeypatch, DEFAULTS
    )
    if facts:
        assert_refused(done, [str(tmp_path / "d.json"), *facts], inputs)
    else:
        assert done.code == 0, done.err


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name, inputs, monkeypatch, tmp_path):
    changes, facts = TASKS[name]
    task = {key: value for key, value in (LABELLED[0] | changes).items() if value is not None}
    write(tmp_path / "t.json", [task, *LABELLED[1:]])
    done = ended(f"train --tasks_file={tmp_path / 't.json'}", inputs, monkeypatch, DEFAULTS)
    assert_refused(done, [str(tmp_path / "t.json"), *facts], inputs)


@pytest.mark.parametrize("name", LINES)
def test_lines(name, inputs, monkeypatch, tmp_path):
    line, facts = LINES[name]
    line += f" --cache_dir={tmp_path}" if line.startswith("train") else ""
    assert_refused(ended(line, inputs, monkeypatch, DEFAULTS), facts, inputs)


def test_numbers_as_text_and_labels_by_number_are_read_from_a_table(inputs, monkeypatch, tmp_path):
    table = "text,text_b,label,task\n2020,,1,tone\nbab,,glad,tone\nbab,12,3.5,closeness\nbab,bek,2,place\n"
    write(tmp_path / "d.csv", table.encode())
    line = f"train --data_path={tmp_path / 'd.csv'} --cache_dir={tmp_path / 'cache'}"
    done = ended(line, inputs, monkeypatch, DEFAULTS)
    assert done.code == 0, done.err
    assert "training examples: tone 2, closeness 1, place 1" in done.err


@pytest.mark.slow
def test_a_tokenizer_without_pad_token_pads_by_another_and_dots_are_fine_in_names(
    train, still, encoder, glue, tmp_path, edit_json
):
    base = still(encoder)
    edit_json(Path(base) / "tokenizer_config.json", pad_token=None)
    text = (glue / "tasks.json").read_text() + (glue / "train.json").read_text()
    assert '"tone"' in text
    for name in ("tasks", "train"):
        (tmp_path / f"{name}.json").write_text(
            (glue / f"{name}.json").read_text().replace('"tone"', '"tone.classifier.0"')
        )
    files = {"tasks_file": str(tmp_path / "tasks.json"), "data_path": str(tmp_path / "train.json")}
    folder = train("run", base_model=base, max_steps=1, **files)
    (tmp_path / "test" / "tone.classifier.0").mkdir(parents=True)
    records = [example | {"task": "tone.classifier.0"} for example in examples(LABELLED[0], 3)]
    write(tmp_path / "test" / "tone.classifier.0" / "test.json", records)
    flags = [f"--checkpoint={folder}", f"--data_dir={tmp_path / 'test'}", "--tasks=tone.classifier.0", "--dtype=fp32"]
    done = run(["evaluate", *flags, f"--output_dir={tmp_path / 'ev'}"])
    assert done.code == 0, done.err
    tasks = json.loads((tmp_path / "ev" / "results.json").read_text())["tasks"]
    assert tasks["tone.classifier.0"]["n"] == 3
