"""What an evaluation's answers depend on: its tasks and their wording, but not the base model's own wishes."""

import json
import shutil

import pytest
from transformers import LlamaForCausalLM

import mtl_lora
from mtl_lora.adapter.checkpoint import Origin
from mtl_lora.errors import UserError
from mtl_lora.language.predictions import Predictions

MOODS = {"name": "boolq", "id": 0, "options": ["true", "false"]}
PAIRS = {"name": "piqa", "id": 1, "options": ["solution1", "solution2"]}


@pytest.fixture
def tasks_file(tmp_path):
    """Write a tasks file and return its path."""

    def write(*tasks: dict) -> str:
        (tmp_path / "tasks.json").write_text(json.dumps(tasks))
        return str(tmp_path / "tasks.json")

    return write


@pytest.fixture
def saved(tiny_base, tmp_path):
    """An adapter that a loop of one's own trained and saved: it says its base model, or more, and two tasks."""

    def save(tasks: list[str], **origin) -> str:
        model = LlamaForCausalLM.from_pretrained(tiny_base)
        mtl_lora.inject(model, mtl_lora.AdapterConfig(tasks=tasks, target_modules=["q_proj"]))
        mtl_lora.save(model, str(tmp_path / "adapter"), Origin(base_model=tiny_base, **origin))
        return str(tmp_path / "adapter")

    return save


def test_generation_is_greedy_whatever_the_base_model_asks_for(evaluate, tiny_base, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(tiny_base, own)
    wishes = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 2.0}
    (own / "generation_config.json").write_text(json.dumps(wishes))
    for name, base in (("plain", tiny_base), ("wishes", str(own))):
        evaluate(name, checkpoint=None, base_model=base)
    plain, wishing = (Predictions(tmp_path / name).read() for name in ("plain", "wishes"))
    assert any(record["text"] for record in plain.values())
    assert [record["text"] for record in wishing.values()] == [record["text"] for record in plain.values()]


@pytest.mark.parametrize("tasks", [["piqa", "boolq"], ["boolq", "piqa"]], ids=["other order", "fewer"])
def test_adapter_is_never_asked_about_tasks_that_are_not_its_own(evaluate, saved, tasks):
    with pytest.raises(UserError, match=f"has weights for the tasks {', '.join(tasks)}, in this order, and would be"):
        evaluate("out", checkpoint=saved(tasks))


def test_adapter_that_does_not_say_its_tasks_and_prompt_is_told(evaluate, saved, tasks_file, tmp_path):
    folder = saved(["boolq", "piqa"])
    evaluate("out", checkpoint=folder, tasks_file=tasks_file(MOODS, PAIRS), template="plain", cutoff_len=200)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["template"], settings["cutoff_len"]) == ("plain", 200)


def test_what_a_checkpoint_says_is_not_asked_again(evaluate, saved):
    folder = saved(["boolq", "piqa"], prompt_template="plain")
    with pytest.raises(UserError, match=r"--template goes without --checkpoint; .* says it itself"):
        evaluate("out", checkpoint=folder, template="alpaca")


@pytest.mark.parametrize("change", [{"pattern": "true"}, {"answer_prefix": "It is "}])
def test_tasks_that_are_read_otherwise_do_not_go_on_with_earlier_answers(evaluate, tiny_base, tasks_file, change):
    flags = {"checkpoint": None, "base_model": tiny_base, "tasks": ["piqa"]}
    evaluate("out", tasks_file=tasks_file(MOODS, PAIRS), **flags)
    evaluate("out", tasks_file=tasks_file(MOODS, {**PAIRS, "title": "Pairs"}), **flags)
    with pytest.raises(UserError, match="holds results with another tasks_sha256"):
        evaluate("out", tasks_file=tasks_file({**MOODS, **change}, PAIRS), **flags)


def test_check_finds_a_folder_of_another_evaluation(evaluate):
    evaluate("out", tasks=["boolq"])
    evaluate("out", tasks=["boolq"], check=True)
    with pytest.raises(UserError, match="holds results with another max_new_tokens"):
        evaluate("out", tasks=["boolq"], max_new_tokens=3, check=True)


def test_agreement_is_of_the_questions_that_were_asked(evaluate):
    evaluate("out", mode="both", tasks=["boolq", "piqa"])
    found = evaluate("out", mode="both", tasks=["piqa"], limit=2)["agreement"]
    assert (found["n"], list(found["tasks"])) == (2, ["piqa"])


def test_task_that_is_named_twice_is_asked_once(evaluate):
    assert evaluate("out", tasks=["boolq", "piqa", "boolq"])["tasks"]["boolq"]["n"] == 4


def test_line_torn_inside_a_character_is_answered_again(tmp_path):
    predictions = Predictions(tmp_path)
    predictions.append([{"task": "own", "index": index, "text": "né"} for index in range(2)])
    predictions.close()
    whole = predictions.own.read_bytes()
    predictions.own.write_bytes(whole[: whole.rindex("é".encode()) + 1])
    assert list(Predictions(tmp_path).read()) == [("own", 0)]
