"""Bad input of images and texts: exit code 2 and one sentence with the facts; nothing written; and odd right input."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from good_inputs import FIXTURES, assert_refused, ended, write
from image_text_cases import TASKS, examples, write_features

VQA, NLVR, CAPTION = (examples(task["name"], 1)[0] for task in TASKS)

# An example in a file between two good ones -> facts of the sentence; none where it is right.
EXAMPLES = {
    "unknown image": (VQA | {"image": "p99"}, ["'p99'", "--features"]),
    "one of two images": (NLVR | {"image": ["p0", "p98"]}, ["'p98'"]),
    "three images": (NLVR | {"image": ["p0", "p1", "p2"]}, ["3 images", "--images 2"]),
    "image twice": (NLVR | {"image": ["p0", "p0"]}, []),
    "no image": ({key: value for key, value in VQA.items() if key != "image"}, ["example 1", "'image'"]),
    "empty caption": (CAPTION | {"answer": " "}, ["example 1", "'answer'", "empty"]),
    "label of no choice": (NLVR | {"answer": "True"}, ["example 1", "'True'", "false, true"]),
    "no text": (VQA | {"text": ""}, ["example 1", "'text' is empty"]),
    "answers as text": (VQA | {"answers": "red"}, ["example 1", "'answers'", "'red'"]),
    "score of a word": (VQA | {"answers": {"red": "much"}}, ["example 1", "'red'", "'much'"]),
    "all scores zero": (VQA | {"answers": {"red": 0}}, []),
    "unknown task": (VQA | {"task": "gqa"}, ["example 1", "'gqa'", "vqa 0"]),
    "very long": (VQA | {"text": "red " * 3000, "answers": {"blue " * 999: 1}}, []),
}
# A command line, completed, -> facts.
LINES = {
    "no features": ("train --features=none.h5", ["none.h5"]),
    "wrong grid": ("train --features=oblong.h5", ["'p3'", "7", "square"]),
    "another grid": ("train --features=mixed.h5", ["'p3'", "(4, 8)"]),
    "broken file": ("train --features=tasks.json", ["tasks.json"]),
    "pool above the grid": ("train --pool=4", ["pool", "3"]),
    "cutoff beyond the positions": ("train --cutoff_len=200 --data_path=long.json", ["96 positions", "--pool"]),
    "encoder": ("train --base_model=bert", ["bert", "encoder"]),
    "size of no task": ("train --task_batches=round_robin --task_batch_sizes=gqa=3", ["'gqa'", "vqa 0"]),
    "size of mixed batches": ("train --task_batch_sizes=vqa=4", ["--task_batches round_robin"]),
    "size without a number": ("train --task_batches=round_robin --task_batch_sizes=vqa", ["task=examples", "'vqa'"]),
    "size twice": ("train --task_batches=round_robin --task_batch_sizes=vqa=1,nlvr=2,vqa=3", ["'vqa' twice"]),
    "budget of one task": ("train --task_batches=round_robin --token_budget=512", ["--token_budget"]),
    "adapter on the visual embedding": ("train --lora_target_modules=feature", ["feature", "modules_to_save"]),
    "flag of another system": ("evaluate --checkpoint= --base_model=bart --no_images", ["--system image_text"]),
    "no way to see": ("evaluate --checkpoint= --system=image_text --base_model=bart", ["--no_images", "--checkpoint"]),
    "features of another model": ("evaluate --features=wide.h5", ["wide.h5", "3 x 3", "5 numbers", "8"]),
    "features of another grid": ("evaluate --features=coarse.h5", ["coarse.h5", "2 x 2", "3 x 3", "8 numbers"]),
    "features of another vision model": ("evaluate --features=other.h5", ["other.h5", "bbb at 98 pixels", "aaa at 98"]),
    "two vision models": (
        "train --features=features.h5,more.h5",
        ["features.h5", "more.h5", "different vision models"],
    ),
    "features and none": ("evaluate --no_images --features=features.h5", ["--no_images", "--features"]),
    "two ablations": ("evaluate --no_images --shuffle_images", ["--no_images", "--shuffle_images"]),
    "page without pictures": ("evaluate --page=3", ["--page N", "--pictures DIR"]),
    "pictures without a page": ("evaluate --pictures=.", ["--page N", "--pictures DIR"]),
    "image in a test set": ("evaluate --data_dir=lost", ["lost/vqa/test.json", "'p99'"]),
    "no right answer": ("evaluate --data_dir=open", ["open/vqa/test.json, example 1", "no answer"]),
    "one image to shuffle": ("evaluate --shuffle_images --data_dir=single --tasks=vqa", ["vqa", "one image"]),
    "tasks of the checkpoint": ("evaluate --tasks_file=tasks.json", ["--tasks_file", "--checkpoint"]),
    "another tokenizer": ("evaluate --caption_tokenizer=nltk", ["caption_tokenizer", "auto, ptb, simple"]),
    "checkpoint of another system": ("evaluate --system=image_text --checkpoint=language", ["language", "--system"]),
    "too many images": ("evaluate --data_dir=three", ["three/nlvr/test.json, example 0", "3 images", "2 at most"]),
    "prediction of an unknown image": ("predict --input=lost/vqa/test.json", ["lost/vqa/test.json", "'p99'"]),
    "prediction of no task": ("predict --input=unnamed.json", ["unnamed.json, example 0", "'task_id'"]),
}
DEFAULTS = {
    "train": "--system=image_text --base_model=bart --tasks_file=tasks.json --data_path=train.json --output_dir=out "
    "--features=features.h5 --lora_target_modules=q_proj --check=True",
    "evaluate": "--checkpoint=ck --data_dir=test --output_dir=out --dtype=fp32 --check=True",
    "predict": "--checkpoint=ck --input=test/vqa/test.json --output=out --dtype=fp32 --check=True",
}


@pytest.fixture(scope="module")
def inputs(trained, bart, pictures, tmp_path_factory) -> Path:
    """A folder with small valid inputs, and some broken ones."""
    folder = tmp_path_factory.mktemp("inputs") / "inputs"
    shutil.copytree(pictures, folder)
    shutil.copytree(trained["bart"], folder / "ck")
    shutil.copytree(bart, folder / "bart")
    shutil.copytree(FIXTURES / "checkpoints" / "mtl_lora", folder / "language")
    write(folder / "bert" / "config.json", {"model_type": "bert"})
    write(folder / "unnamed.json", [{"image": "p0", "text": "red?"}])
    write(folder / "long.json", [NLVR | {"text": "red box " * 90}])
    write_features(folder / "wide.h5", dim=5)
    write_features(folder / "coarse.h5", grid=2)
    write_features(folder / "other.h5", made_by="bbb")
    write_features(folder / "more.h5", images=["p77"], made_by="bbb")
    for name, cells in {"oblong": 7, "mixed": 4}.items():
        shutil.copy(folder / "features.h5", folder / f"{name}.h5")
        with h5py.File(folder / f"{name}.h5", "r+") as opened:
            del opened["p3"]
            opened.create_group("p3")["features"] = np.zeros((cells, 8), dtype="float32")
    sets = {
        "lost": ("vqa", [VQA | {"image": "p99"}]),
        "open": ("vqa", [VQA, VQA | {"answers": {}}]),
        "single": ("vqa", [VQA, VQA]),
        "three": ("nlvr", [NLVR | {"image": ["p0", "p1", "p2"]}]),
    }
    for name, (task, content) in sets.items():
        shutil.copytree(folder / "test", folder / name)
        write(folder / name / task / "test.json", content)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, inputs, monkeypatch, tmp_path):
    example, facts = EXAMPLES[name]
    write(tmp_path / "d.json", [VQA, example, CAPTION])
    done = ended(
        f"train --data_path={tmp_path / 'd.json'} --cache_dir={tmp_path / 'cache'}", inputs, monkeypatch, DEFAULTS
    )
    if facts:
        assert_refused(done, facts, inputs)
    else:
        assert done.code == 0, done.err


@pytest.mark.parametrize("name", LINES)
def test_lines(name, inputs, monkeypatch, tmp_path):
    line, facts = LINES[name]
    line += f" --cache_dir={tmp_path}" if line.startswith("train") else ""
    assert_refused(ended(line, inputs, monkeypatch, DEFAULTS), facts, inputs)


def test_several_right_answers_need_a_metric_that_takes_them(inputs, pictures, bart, monkeypatch, tmp_path):
    tasks = [{**TASKS[0], "metric": "exact_match"}]
    write(tmp_path / "t.json", tasks)
    write(tmp_path / "test" / "vqa" / "test.json", [VQA])
    line = (
        f"evaluate --checkpoint= --system=image_text --base_model=bart --no_images --tasks_file={tmp_path / 't.json'}"
    )
    done = ended(f"{line} --data_dir={tmp_path / 'test'}", inputs, monkeypatch, DEFAULTS)
    assert_refused(done, ["example 0 has 2 right answers", "exact_match", "vqa_accuracy"], inputs)


def test_ids_and_tasks_by_number_are_read_from_a_table(inputs, monkeypatch, tmp_path):
    write_features(inputs / "numbered.h5", images=["7", "8"])
    table = "image,text,answer,task_id\n7,what is red?,box,0\n8,a box.,true,1\n7,,a red box,2\n"
    write(tmp_path / "d.csv", table.encode())
    line = f"train --data_path={tmp_path / 'd.csv'} --features=numbered.h5 --cache_dir={tmp_path / 'cache'}"
    done = ended(line, inputs, monkeypatch, DEFAULTS)
    assert done.code == 0, done.err
    assert "training examples: vqa 1, nlvr 1, caption 1" in done.err
