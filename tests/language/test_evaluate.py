"""Evaluations: what they write, what their answers depend on and what not, that they resume and refuse."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import PROJECT, QUICKSTART
from transformers import LlamaConfig, LlamaForCausalLM

import mtl_lora
from mtl_lora import files
from mtl_lora.adapter.checkpoint import Origin
from mtl_lora.errors import UserError
from mtl_lora.evaluation import Predictions
from mtl_lora.export.peft import export_peft
from mtl_lora.language.config import EvalConfig, TrainConfig
from mtl_lora.language.evaluate import Evaluator, run
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.results import Results

FEW = ["boolq", "ARC-Easy"]  # tasks of two and of four options, where eight show no more than two


def arguments(output: Path, **flags) -> dict:
    settings = {"data_dir": str(QUICKSTART / "test"), "limit": 4, "dtype": "fp32", "max_new_tokens": 8}
    return settings | {"output_dir": str(output), **flags}


@pytest.fixture
def evaluate(trained, tmp_path):
    """Evaluate in this process: ``evaluate("name", flag=value, ...)`` returns the results by protocol."""

    def start(name: str, **flags) -> dict[str, Results]:
        return run(EvalConfig(**arguments(tmp_path / name, **{"checkpoint": trained, **flags})))

    return start


@pytest.fixture(scope="session")
def whole(trained, made_once) -> Path:
    """A folder with an evaluation of all eight tasks by both protocols, which no test changes."""
    return made_once("evaluated", lambda folder: run(EvalConfig(**arguments(folder, checkpoint=trained, mode="both"))))


def lines(folder: Path) -> list[dict]:
    found = []
    for path in sorted((folder / "predictions").glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def write_test_set(folder: Path, records: object, task: str = "boolq") -> str:
    (folder / task).mkdir(parents=True, exist_ok=True)
    (folder / task / "test.json").write_text(records if isinstance(records, str) else json.dumps(records))
    return str(folder)


def quickstart_test(task: str) -> list[dict]:
    return json.loads((QUICKSTART / "test" / task / "test.json").read_text())


@pytest.mark.slow(1)
def test_layers_that_the_model_does_not_call_are_named(evaluate, monkeypatch, capsys):
    build = Evaluator.build

    def one_layer_less(self):
        model = build(self)
        model.config.num_hidden_layers -= 1  # of the layers, LLaMA's forward runs as many
        return model

    evaluate("whole", tasks=["boolq"])
    assert "has no effect" not in capsys.readouterr().err
    monkeypatch.setattr(Evaluator, "build", one_layer_less)
    evaluate("less", tasks=["boolq"])
    assert "adapter layer model.layers.1.self_attn.q_proj and 3 others of 8 has no effect" in capsys.readouterr().err


# ---- what is written ----


@pytest.mark.slow(1)
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_results_hold_what_was_measured_and_how(whole, mode):
    results, found = Results.load(whole / mode), lines(whole / mode)
    assert (results.system, results.method, results.method_title, results.mode) == ("language", *MTL_LORA, mode)
    assert results.name == f"MTL-LoRA ({mode})", "the two rows of a table have names of their own"
    assert len(results.tasks) == 8
    for name, task in results.tasks.items():
        correct = [line["correct"] for line in found if line["task"] == name]
        assert (task.metric, task.n, task.measured["correct"]) == ("accuracy", 4, sum(correct))
        assert (task.value, task.majority is not None) == (sum(correct) / 4, True)
        assert set(task.others) == {"strict" if mode == "generate" else "acc_norm"}
    assert results.data["piqa"] == files.sha256(QUICKSTART / "test" / "piqa" / "test.json")
    assert (results.settings["template"], results.settings["protocol"], results.settings["limit"]) == ("alpaca", 1, 4)
    assert results.settings.get("extraction") == {"generate": 1, "score": None}[mode]
    assert results.trainable.total > results.trainable.adapter > 0
    assert {"torch", "transformers", "python", "mtl_lora"} <= results.versions.keys()
    assert len(found) == 32
    assert all(line["correct"] == (line["parsed"] == line["answer"]) for line in found)
    assert all(("scores" in line) == (mode == "score") for line in found)


MTL_LORA = ("mtl_lora", "MTL-LoRA")


@pytest.mark.slow(1)
def test_both_protocols_run_one_after_the_other_and_their_agreement_is_counted(whole, evaluate, tmp_path):
    for mode in ("generate", "score"):
        assert evaluate(mode, mode=mode, tasks=FEW)[mode].tasks.items() <= Results.load(whole / mode).tasks.items()
        here = [line for line in lines(whole / mode) if line["task"] in FEW]
        assert lines(tmp_path / mode) == here
    generated, scored = lines(whole / "generate"), lines(whole / "score")
    same = [one["parsed"] == other["parsed"] for one, other in zip(generated, scored, strict=True)]
    agreement = json.loads((whole / "agreement.json").read_text())
    assert (agreement["all"], agreement["n"], len(agreement["tasks"])) == (sum(same) / 32, 32, 8)


@pytest.mark.slow(1)
def test_one_protocol_after_both_goes_on_with_its_part_of_them(trained, tmp_path):
    flags = {"checkpoint": str(shutil.copytree(trained, tmp_path / "run")), "tasks": ["boolq"], "output_dir": None}
    run(EvalConfig(**arguments(tmp_path, **flags, mode="both")))
    folder = tmp_path / "run" / "evaluation"
    before, answers = Results.load(folder / "score"), lines(folder / "score")
    again = run(EvalConfig(**arguments(tmp_path, **flags, mode="score")))["score"]
    assert (again.name, again.tasks) == (before.name, before.tasks) and again.name.endswith(" (score)")
    assert lines(folder / "score") == answers and not (folder / "results.json").exists()


def test_agreement_is_of_the_questions_that_were_answered(whole, trained, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    fewer = arguments(tmp_path / "out", checkpoint=trained, mode="both", tasks=["piqa", "piqa"], limit=2)
    for part in (fewer, {**fewer, "tasks": [], "limit": 3}, {**fewer, "limit": 4}):
        with pytest.raises(UserError, match=r"results\.json holds the results of .*boolq"):
            run(EvalConfig(**part))
    assert Results.load(tmp_path / "out" / "score") == Results.load(whole / "score"), "a part never replaces the whole"
    for mode in ("generate", "score"):
        (tmp_path / "out" / mode / "results.json").unlink()
    run(EvalConfig(**fewer))
    agreement = json.loads((tmp_path / "out" / "agreement.json").read_text())
    assert (agreement["n"], list(agreement["tasks"])) == (2, ["piqa"])
    assert Results.load(tmp_path / "out" / "score").tasks["piqa"].n == 2
    assert lines(tmp_path / "out" / "score") == lines(whole / "score"), "a smaller evaluation deletes no answers"


def test_the_base_model_alone_is_evaluated_in_the_same_words(evaluate, whole, tiny_base, tmp_path):
    results = evaluate("base", checkpoint=None, base_model=tiny_base, tasks=FEW)["generate"]
    assert (results.method, results.method_title, results.trainable, results.name) == (None, None, None, tiny_base)
    adapted = {(line["task"], line["index"]): line["prompt_sha256"] for line in lines(whole / "generate")}
    assert all(adapted[line["task"], line["index"]] == line["prompt_sha256"] for line in lines(tmp_path / "base"))


def test_free_text_is_measured_by_the_metric_of_its_task(evaluate, tiny_base, tmp_path):
    tasks = [{"name": "free", "id": 0}, {"name": "long", "id": 1, "metric": "f1"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    for task in ("free", "long"):
        data = write_test_set(tmp_path / "data", [{"instruction": "a", "output": "b", "answer": "b"}] * 2, task)
    flags = {"checkpoint": None, "base_model": tiny_base, "tasks_file": str(tmp_path / "tasks.json"), "data_dir": data}
    results = evaluate("out", **flags)["generate"].tasks
    assert (results["free"].metric, results["long"].metric) == ("exact_match", "f1")
    assert results["long"].value == results["long"].measured["f1"] and "f1" in results["free"].measured
    assert Results.load(tmp_path / "out").tasks == results


def test_answers_that_are_longer_than_what_is_generated_are_said(evaluate, tiny_base, tmp_path, capsys):
    tasks = [{"name": "long", "id": 0, "options": ["a word", "many " * 12 + "words"]}, {"name": "free", "id": 1}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    for task, answers in (("long", [tasks[0]["options"][number] for number in (0, 1, 1)]), ("free", ["b"])):
        records = [{"instruction": "a", "answer": answer} for answer in answers]
        data = write_test_set(tmp_path / "data", records, task)
    flags = {"checkpoint": None, "base_model": tiny_base, "tasks_file": str(tmp_path / "tasks.json"), "data_dir": data}
    evaluate("few", **flags, max_new_tokens=32, check=True)
    assert "2 questions of long have an answer with more tokens than --max_new_tokens 32" in capsys.readouterr().err
    evaluate("many", **flags, max_new_tokens=120, check=True)
    evaluate("score", **flags, tasks=["long"], max_new_tokens=32, mode="score", check=True)
    assert "more tokens" not in capsys.readouterr().err


def test_a_base_model_alone_is_asked_as_a_training_asks_by_default(tiny_base):
    made = Evaluator(EvalConfig(base_model=tiny_base))
    assert (made.template, made.cutoff_len) == (TrainConfig.template, TrainConfig.cutoff_len)


@pytest.mark.parametrize(("recorded", "cutoff_len"), [(64, 64), (None, TrainConfig.cutoff_len)])
def test_a_checkpoint_says_how_long_its_prompts_are(trained, tmp_path, edit_json, recorded, cutoff_len):
    path = shutil.copytree(trained, tmp_path / "run") / "mtl_lora_config.json"
    edit_json(path, provenance=json.loads(path.read_text())["provenance"] | {"cutoff_len": recorded})
    evaluator = Evaluator(EvalConfig(checkpoint=str(tmp_path / "run")))
    assert evaluator.cutoff_len == evaluator.encoder.cutoff_len == cutoff_len


def test_results_name_the_latest_rules_of_extraction_that_one_of_their_tasks_needs():
    made = Evaluator.__new__(Evaluator)
    made.tasks = TaskSet((Task("free", 0), Task("mood", 1, ("happy", "sad"))))
    assert [task.extraction for task in made.tasks] == [5, 5]
    assert made.results_settings("generate") == {"extraction": 5} and made.results_settings("score") == {}


def test_both_protocols_score_what_has_options_and_generate_everything(evaluate, tiny_base, tmp_path):
    tasks = [{"name": "free", "id": 0}, {"name": "mood", "id": 1, "options": ["happy", "sad"]}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    for task in ("free", "mood"):
        record = {"instruction": "a", "output": "the correct answer is sad", "answer": "sad"}
        data = write_test_set(tmp_path / "data", [record] * 2, task)
    flags = {"checkpoint": None, "base_model": tiny_base, "tasks_file": str(tmp_path / "tasks.json"), "data_dir": data}
    found = evaluate("out", mode="both", **flags)
    assert {mode: list(results.tasks) for mode, results in found.items()} == {
        "generate": ["free", "mood"],
        "score": ["mood"],
    }
    assert json.loads((tmp_path / "out" / "agreement.json").read_text())["n"] == 2
    assert list(evaluate("free", mode="both", tasks=["free"], **flags)) == ["generate"]
    assert not (tmp_path / "free" / "score").exists() and not (tmp_path / "free" / "agreement.json").exists()


# ---- what does not change an answer ----


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_answers_do_not_depend_on_batches_or_on_a_reused_prefix(evaluate, tmp_path, mode):
    variants = {
        "one": {"batch_size": 1},
        "three": {"batch_size": 3},
        "sixteen": {"batch_size": 16},
        "alone": {"reuse_prefix": False},
    }
    for name, flags in variants.items():
        evaluate(name, mode=mode, tasks=FEW, limit=8, **flags)
    first = lines(tmp_path / "one")
    for name in variants:
        for line, other in zip(first, lines(tmp_path / name), strict=True):
            assert other.pop("scores", 0) == pytest.approx(line.get("scores", 0), abs=1e-4)
            assert other == {key: value for key, value in line.items() if key != "scores"}


@pytest.mark.slow
def test_beams_reuse_a_prefix_too(evaluate, tmp_path):
    evaluate("reused", num_beams=3, tasks=FEW)
    evaluate("alone", num_beams=3, tasks=FEW, reuse_prefix=False, batch_size=1)
    assert lines(tmp_path / "reused") == lines(tmp_path / "alone")


@pytest.mark.slow(1)
def test_generation_is_greedy_whatever_the_base_model_configures(evaluate, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    configured = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "temperature": 2.0}
    (other / "generation_config.json").write_text(json.dumps(configured))
    for name, base in (("plain", tiny_base), ("configured", str(other))):
        evaluate(name, checkpoint=None, base_model=base, tasks=FEW)
    plain, configured = (lines(tmp_path / name) for name in ("plain", "configured"))
    assert any(line["text"] for line in plain)
    assert [line["text"] for line in configured] == [line["text"] for line in plain]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.slow
def test_a_peft_folder_gets_the_scores_of_the_checkpoint_it_came_from(evaluate, train, tmp_path, method):
    checkpoint = train("run", adapter_name=method, max_steps=3, learning_rate=3e-2)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["piqa"])
    here = evaluate("here", checkpoint=str(checkpoint), mode="score", tasks=["piqa"])["score"]
    there = evaluate("there", checkpoint=None, peft=str(folder), mode="score", tasks=["piqa"])["score"]
    assert (there.tasks, there.trainable, there.method) == (here.tasks, here.trainable, "peft_lora")
    for one, other in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


@pytest.fixture(scope="module")
def of_peft(trained, tmp_path_factory):
    (folder,) = export_peft(trained, tmp_path_factory.mktemp("peft"), ["piqa"], overwrite=True)
    return folder


@pytest.mark.slow(1)
def test_answers_are_of_one_scaling_of_an_adapter(evaluate, trained, of_peft, tmp_path, edit_json):
    """Of the same weights: somebody tries another alpha in the adapter's own file."""
    few = {"tasks": ["piqa"], "limit": 1, "mode": "score"}
    own, other = (shutil.copytree(made, tmp_path / name) for made, name in ((trained, "own"), (of_peft, "other")))
    for name, flags, file in (
        ("own", {"checkpoint": str(own)}, "mtl_lora_config.json"),
        ("other", {"checkpoint": None, "peft": str(other)}, "adapter_config.json"),
    ):
        evaluate(f"{name} out", **flags, **few)
        path = tmp_path / name / file
        value = json.loads(path.read_text())
        value.get("adapter", value)["alpha" if "adapter" in value else "lora_alpha"] = 1
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match="answers given with another adapter_config_sha256"):
            evaluate(f"{name} out", **flags, **few)


def test_a_peft_folder_may_hold_embeddings_too(evaluate, tiny_base, tmp_path):
    model, settings = LlamaForCausalLM.from_pretrained(tiny_base), {"r": 2, "target_modules": ["q_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    few = {"tasks": ["piqa"], "limit": 1, "mode": "score"}
    assert evaluate("out", checkpoint=None, base_model=tiny_base, peft=str(tmp_path / "peft"), **few)["score"].tasks


def test_a_base_with_a_peft_adapter_in_its_folder_is_no_base_model_alone(evaluate, of_peft, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copytree(of_peft, base, dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"holds a PEFT adapter.*move adapter_config.json"):
        evaluate("out", checkpoint=None, base_model=str(base), tasks=FEW)


def test_a_peft_folder_that_was_cut_off_is_refused(evaluate, of_peft, tiny_base, tmp_path):
    folder = shutil.copytree(of_peft, tmp_path / "cut")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"PEFT cannot load .*cut"):
        evaluate("out", checkpoint=None, peft=str(folder), base_model=tiny_base, tasks=FEW)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_peft_folder_of_another_depth_is_refused(evaluate, of_peft, tiny_base, tmp_path, layers):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = LlamaConfig.from_pretrained(base, num_hidden_layers=layers)
    LlamaForCausalLM(config).save_pretrained(base)
    with pytest.raises(UserError, match=r"do not match: model\.layers\..* is only in one of them"):
        evaluate("out", checkpoint=None, base_model=str(base), peft=str(of_peft), tasks=["piqa"], limit=1)


@pytest.mark.slow(1)
@pytest.mark.parametrize("entry", ["model.norm", "lm_head"])
def test_a_module_saved_whole_counts_once_among_all_parameters(evaluate, tiny_base, tmp_path, entry):
    from mtl_lora.export.peft import export_peft

    model = LlamaForCausalLM.from_pretrained(tiny_base)
    base = sum(parameter.numel() for parameter in model.parameters())
    mtl_lora.inject(model, mtl_lora.AdapterConfig("lora", target_modules=["q_proj"], modules_to_save=[entry]))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    saved = model.get_submodule(entry).weight.numel()
    mtl_lora.save(model, tmp_path / "saved")
    few = {"tasks": ["piqa"], "limit": 1, "mode": "score"}
    count = evaluate("here", checkpoint=str(tmp_path / "saved"), **few)["score"].trainable
    assert (count.adapter, count.total) == (trained, base + trained - saved)
    if entry == "model.norm":  # PEFT does not hold a head that is tied to the embedding
        (folder,) = export_peft(tmp_path / "saved", tmp_path / "peft")
        assert evaluate("there", checkpoint=None, peft=str(folder), **few)["score"].trainable == count


# ---- what an answer depends on ----


@pytest.mark.slow(1)
def test_a_changed_test_set_is_answered_again(evaluate, tmp_path):
    data = write_test_set(tmp_path / "data", quickstart_test("boolq"))
    before = evaluate("out", data_dir=data, tasks=["boolq"])["generate"]
    swapped = [{**one, "answer": {"true": "false", "false": "true"}[one["answer"]]} for one in quickstart_test("boolq")]
    after = evaluate("out", data_dir=write_test_set(tmp_path / "data", swapped), tasks=["boolq"])["generate"]
    assert after.data != before.data
    assert after.tasks["boolq"].measured["correct"] <= 4 - before.tasks["boolq"].measured["correct"]


@pytest.mark.slow(1)
def test_lines_of_an_earlier_test_set_never_win_over_new_ones(evaluate, tmp_path):
    """Of several tasks, for the order in which files are read depends on the task's name."""
    for task in FEW:
        data = write_test_set(tmp_path / "data", quickstart_test(task)[:8], task)
    evaluate("out", data_dir=data, tasks=FEW, limit=0)
    for task in FEW:
        write_test_set(tmp_path / "data", quickstart_test(task)[4:8], task)
    evaluate("out", data_dir=data, tasks=FEW, limit=0)
    evaluate("fresh", data_dir=data, tasks=FEW, limit=0)
    assert lines(tmp_path / "out") == lines(tmp_path / "fresh"), "lines beyond a test set that shrank are dropped"


@pytest.mark.slow(1)
def test_what_a_killed_launch_of_other_processes_left_never_wins_over_new_answers(evaluate, tmp_path):
    data = write_test_set(tmp_path / "data", quickstart_test("boolq")[:8])
    evaluate("out", data_dir=data, tasks=["boolq"], limit=0)
    predictions = tmp_path / "out" / "predictions"
    odd = [line for line in lines(tmp_path / "out") if line["index"] % 2]  # the part of the second of two processes
    (predictions / "~part-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    for name in ("boolq.jsonl", "../results.json"):
        (predictions / name).unlink()
    write_test_set(tmp_path / "data", quickstart_test("boolq")[8:16])
    evaluate("out", data_dir=data, tasks=["boolq"], limit=0)
    evaluate("fresh", data_dir=data, tasks=["boolq"], limit=0)
    assert lines(tmp_path / "out") == lines(tmp_path / "fresh")


@pytest.mark.slow(1)
def test_results_of_test_sets_elsewhere_stay(evaluate, tmp_path):
    few = {"tasks": ["boolq"], "limit": 2}
    before = evaluate("out", data_dir=write_test_set(tmp_path / "test", quickstart_test("boolq")[:4]), **few)
    dev = write_test_set(tmp_path / "dev", quickstart_test("boolq")[4:8])
    for check in (True, False):
        with pytest.raises(
            UserError, match=r"results\.json holds the results of .*/test, not of .*/dev; .*--output_dir"
        ):
            evaluate("out", data_dir=dev, check=check, **few)
    assert Results.load(tmp_path / "out") == before["generate"]
    moved = shutil.copytree(tmp_path / "test", tmp_path / "moved")
    assert evaluate("out", data_dir=str(moved), **few)["generate"].tasks == before["generate"].tasks
    assert evaluate("out", data_dir=dev, overwrite=True, **few)["generate"].data != before["generate"].data


def test_texts_of_an_earlier_version_are_extracted_by_the_rules_of_today(evaluate, tmp_path):
    evaluate("out", tasks=FEW)
    before = lines(tmp_path / "out")
    for task in FEW:
        changed = [{**line, "parsed": "by older rules", "correct": True} for line in before if line["task"] == task]
        text = "".join(json.dumps(line) + "\n" for line in changed)
        (tmp_path / "out" / "predictions" / f"{task}.jsonl").write_text(text)
    results = evaluate("out", tasks=FEW)["generate"]
    assert lines(tmp_path / "out") == before
    assert results.tasks["boolq"].measured["correct"] == sum(one["correct"] for one in before if one["task"] == "boolq")


@pytest.mark.slow(1)
def test_answers_of_another_adapter_setting_or_protocol_do_not_mix(evaluate, tiny_base, tmp_path, edit_json):
    evaluate("out", tasks=FEW)
    for flags, name in (
        ({"max_new_tokens": 9}, "max_new_tokens"),
        ({"max_new_tokens": 9, "check": True}, "max_new_tokens"),
        ({"checkpoint": None, "base_model": tiny_base}, "adapter_config_sha256, adapter_sha256"),
    ):
        with pytest.raises(UserError, match=f"another {name}; pass another --output_dir"):
            evaluate("out", tasks=FEW, **flags)
    # As version 0.1.0, whose protocol was the first.
    edit_json(tmp_path / "out" / "settings.json", protocol=None, adapter_config_sha256=None)
    evaluate("out", tasks=FEW, check=True)
    edit_json(tmp_path / "out" / "settings.json", protocol=0)
    with pytest.raises(UserError, match="another protocol"):
        evaluate("out", tasks=FEW)
    evaluate("out", tasks=FEW, overwrite=True)


@pytest.fixture
def saved(tiny_base, tmp_path):
    """An adapter of two tasks that a loop of one's own trained and saved; the test decides what it names."""

    def save(tasks: list[str], **origin) -> str:
        model = LlamaForCausalLM.from_pretrained(tiny_base)
        mtl_lora.inject(model, mtl_lora.AdapterConfig(tasks=tasks, target_modules=["q_proj"]))
        mtl_lora.save(model, str(tmp_path / "adapter"), Origin(base_model=tiny_base, **origin))
        return str(tmp_path / "adapter")

    return save


MOODS = {"name": "boolq", "id": 0, "options": ["true", "false"]}
PAIRS = {"name": "piqa", "id": 1, "options": ["solution1", "solution2"]}


def tasks_file(folder: Path, *tasks: dict) -> str:
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return str(folder / "tasks.json")


@pytest.mark.parametrize("tasks", [["piqa", "boolq"], ["boolq"]], ids=["other order", "fewer"])
def test_an_adapter_never_answers_for_tasks_that_are_not_its_own(evaluate, saved, tmp_path, tasks):
    flags = {"tasks_file": tasks_file(tmp_path, MOODS, PAIRS), "template": "plain", "cutoff_len": 200}
    with pytest.raises(UserError, match=f"has weights for the tasks {', '.join(tasks)}, in this order"):
        evaluate("out", checkpoint=saved(tasks), **flags)


def test_an_evaluation_keeps_doras_norms(tiny_base, tmp_path):
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    mtl_lora.inject(model, mtl_lora.AdapterConfig("dora", target_modules=["q_proj"]))
    mtl_lora.save(model, str(tmp_path / "adapter"), Origin(base_model=tiny_base))
    evaluator = Evaluator(EvalConfig(checkpoint=str(tmp_path / "adapter"), template="plain", cutoff_len=256))
    evaluator.load()
    assert all(layer.kept_norm is not None for layer in mtl_lora.adapter_layers(evaluator.model).values())


def test_flags_give_what_an_adapter_does_not_define(evaluate, saved, tmp_path):
    tasks = tasks_file(tmp_path, MOODS, PAIRS)
    evaluate("out", checkpoint=saved(["boolq", "piqa"]), tasks_file=tasks, template="plain", cutoff_len=200)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["template"], settings["cutoff_len"]) == ("plain", 200)
    with pytest.raises(UserError, match="--template cannot be combined with --checkpoint"):
        evaluate("out", checkpoint=saved(["boolq", "piqa"], prompt_template="plain"), template="alpaca")


@pytest.mark.parametrize("change", [{"pattern": "true"}, {"answer_prefix": "It is "}])
def test_tasks_with_another_answer_extraction_do_not_resume_earlier_answers(evaluate, tiny_base, tmp_path, change):
    flags = {"checkpoint": None, "base_model": tiny_base, "tasks": ["piqa"], "limit": 1}
    evaluate("out", tasks_file=tasks_file(tmp_path, MOODS, PAIRS), **flags)
    evaluate("out", tasks_file=tasks_file(tmp_path, MOODS, {**PAIRS, "title": "Pairs"}), **flags)
    with pytest.raises(UserError, match="another tasks_sha256"):
        evaluate("out", tasks_file=tasks_file(tmp_path, {**MOODS, **change}, PAIRS), **flags)


def test_a_base_that_computes_otherwise_does_not_resume_earlier_answers(evaluate, tiny_base, tmp_path, edit_json):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    flags = {"checkpoint": None, "base_model": str(base), "tasks": ["piqa"], "limit": 1}
    evaluate("out", **flags)
    edit_json(tmp_path / "out" / "settings.json", base_config_sha256=None)
    evaluate("out", **flags)  # of an earlier version, which did not record it
    edit_json(base / "config.json", rms_norm_eps=0.5)
    evaluate("new", **flags)
    edit_json(base / "config.json", rms_norm_eps=0.4)
    with pytest.raises(UserError, match="another base_config_sha256"):
        evaluate("new", **flags)


# ---- resuming ----


def test_a_finished_evaluation_is_not_run_again(whole, trained, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(Evaluator, "load", lambda self: pytest.fail("the model was loaded again"))
    again = run(EvalConfig(**arguments(tmp_path / "out", checkpoint=trained, mode="both")))
    assert {mode: results.tasks for mode, results in again.items()} == {
        mode: Results.load(whole / mode).tasks for mode in ("generate", "score")
    }


@pytest.mark.slow(1)
def test_an_interrupted_evaluation_resumes_and_repairs_torn_lines(evaluate, tmp_path, monkeypatch):
    complete = evaluate("complete", tasks=FEW, limit=10, batch_size=5)["generate"]
    answered = []
    answer = Evaluator.answer

    def stop_after_two(self, questions, protocol):
        if len(answered) == 10:
            raise KeyboardInterrupt
        answered.extend(question.key for question in questions)
        return answer(self, questions, protocol)

    monkeypatch.setattr(Evaluator, "answer", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        evaluate("cut", tasks=FEW, limit=10, batch_size=5)
    part = tmp_path / "cut" / "predictions" / "~part-0.jsonl"
    *kept, last = part.read_text().splitlines(keepends=True)
    without_prompt = json.dumps({"task": "boolq", "index": 9, "answer": "true"}) + "\n"
    part.write_text("".join([*kept, without_prompt, last[:-20]]))  # as a kill in the middle of a line leaves it
    answered.clear()
    monkeypatch.setattr(Evaluator, "answer", lambda self, *batch: answered.extend(batch[0]) or answer(self, *batch))
    assert evaluate("cut", tasks=FEW, limit=10, batch_size=5)["generate"].tasks == complete.tasks
    # The batch of the torn line is answered whole, and that of the line without its prompt.
    assert len(answered) in (15, 20) and lines(tmp_path / "cut") == lines(tmp_path / "complete")


# The process kills itself once twelve answers are on disk, a moment at which nothing waits for it.
KILLED = """
import json, os, signal, sys
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import run
from mtl_lora.evaluation import Predictions

append, written = Predictions.append, []

def killed_after_twelve(self, lines):
    append(self, lines)
    written.extend(lines)
    if len(written) >= 12:
        os.kill(os.getpid(), signal.SIGKILL)

Predictions.append = killed_after_twelve
run(EvalConfig(**json.loads(sys.argv[1])))
"""


@pytest.mark.slow(10)
def test_stop_while_an_evaluation_is_deleted_leaves_no_answers_without_their_settings(evaluate, tmp_path, monkeypatch):
    flags = {"tasks": ["boolq"], "mode": "score"}
    evaluate("out", **flags)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate("out", **flags, template=None, overwrite=True)
    assert not (tmp_path / "out" / "results.json").exists() and (tmp_path / "out" / "settings.json").exists()
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(UserError, match=r"out holds answers without their settings\.json"):
        evaluate("out", **flags)


def stopped(*arguments, **options):
    raise KeyboardInterrupt


def test_second_evaluation_of_a_folder_is_refused_and_changes_nothing(evaluate, tmp_path):
    before = evaluate("out", tasks=["boolq"], mode="score")["score"].to_json()
    with files.claimed(tmp_path / "out"), pytest.raises(UserError, match="out is in use"):
        evaluate("out", tasks=["boolq"], mode="score", overwrite=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == before


def test_checkpoint_that_is_replaced_before_it_is_loaded_is_refused(evaluate, trained, train, tmp_path, monkeypatch):
    before = evaluate("out", tasks=["boolq"], mode="score")["score"].to_json()
    other, load = train("other", max_steps=1), mtl_lora.load
    shutil.copytree(trained, tmp_path / "run")

    def replaced_before(*arguments):
        for name in ("mtl_lora.safetensors", "mtl_lora_config.json"):
            shutil.copy(other / name, tmp_path / "run" / name)
        return load(*arguments)

    monkeypatch.setattr(mtl_lora, "load", replaced_before)
    with pytest.raises(UserError, match="run was replaced"):
        evaluate("out", checkpoint=str(tmp_path / "run"), tasks=["boolq"], mode="score", overwrite=True)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == before


def test_a_base_model_that_is_replaced_before_it_is_loaded_is_refused(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    evaluator = Evaluator(EvalConfig(base_model=str(base)))
    state = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="was replaced during the run"):
        evaluator.load()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_predictions_of_one_that_was_not(evaluate, trained, tmp_path):
    flags = arguments(tmp_path / "cut", checkpoint=trained, mode="score", batch_size=2)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(flags)], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len(Predictions(tmp_path / "cut").read()) == 12 and not (tmp_path / "cut" / "results.json").exists()
    evaluate("complete", mode="score", batch_size=2)
    evaluate("cut", mode="score", batch_size=2)
    assert lines(tmp_path / "cut") == lines(tmp_path / "complete")


def test_line_breaks_of_other_scripts_do_not_tear_a_prediction(tmp_path):
    line = {"task": "own", "index": 0, "text": "a\u2028b\u0085c"}
    predictions = Predictions(tmp_path)
    predictions.append([line])
    predictions.gather(predictions.read(), {"own": 1})
    assert [path.name for path in predictions.folder.iterdir()] == ["own.jsonl"]
    assert predictions.read() == {("own", 0): line}


def test_line_torn_inside_a_character_is_left_out(tmp_path):
    predictions = Predictions(tmp_path)
    predictions.append([{"task": "own", "index": index, "text": "né"} for index in range(2)])
    complete = predictions.own.read_bytes()
    predictions.own.write_bytes(complete[: complete.rindex("é".encode()) + 1])
    assert list(Predictions(tmp_path).read()) == [("own", 0)]


@pytest.mark.parametrize(
    "line", [{"task": "../other"}, {"task": ".."}, {"index": "x"}, {"index": True}, {"index": -1}, {"task": 5}]
)
def test_a_line_whose_task_is_no_files_name_is_none(tmp_path, line):
    predictions = Predictions(tmp_path / "own")
    predictions.append([{"task": "own", "index": 0, **line}])
    predictions.own.write_text(predictions.own.read_text() + "[" * 100_000)
    predictions.gather(predictions.read(), {"own": 1})
    assert not list(tmp_path.rglob("*.jsonl"))


def test_answers_that_are_kept_are_counted_aloud(evaluate, capsys):
    evaluate("out", tasks=FEW)
    assert "kept" not in capsys.readouterr().err
    evaluate("out", tasks=FEW)
    assert "no question is asked" in capsys.readouterr().err


# ---- refusals ----


def test_settings_of_another_program_are_not_replaced(evaluate, tmp_path):
    path = tmp_path / "out" / "settings.json"
    path.parent.mkdir()
    path.write_text('{"editor.fontSize": 12}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"settings.json was not written by an evaluation"):
            evaluate("out", tasks=FEW, overwrite=overwrite)
    assert path.read_text() == '{"editor.fontSize": 12}'


def broken_checkpoint(trained: str, folder: Path, change) -> str:
    """A copy of a checkpoint whose tensors were changed and whose hash was made to fit."""
    shutil.copytree(trained, folder)
    state = load_file(folder / "mtl_lora.safetensors")
    change(state)
    save_file(state, folder / "mtl_lora.safetensors")
    config = json.loads((folder / "mtl_lora_config.json").read_text())
    config["weights_sha256"] = files.sha256(folder / "mtl_lora.safetensors")
    (folder / "mtl_lora_config.json").write_text(json.dumps(config))
    return str(folder)


NAME = "model.layers.0.self_attn.q_proj.lora_A"


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(evaluate, trained, tmp_path):
    folder = broken_checkpoint(trained, tmp_path / "broken", lambda state: state.pop(NAME))
    with pytest.raises(UserError, match=NAME):
        evaluate("out", checkpoint=folder, tasks=FEW)


def test_a_configuration_of_other_sizes_takes_no_memory(evaluate, trained, tmp_path, edit_json):
    folder = shutil.copytree(trained, tmp_path / "huge")
    config = json.loads((folder / "mtl_lora_config.json").read_text())
    edit_json(folder / "mtl_lora_config.json", adapter=config["adapter"] | {"rank": 10**9})
    with pytest.raises(UserError, match=r"numbers, but mtl_lora_config.json describes"):
        evaluate("out", checkpoint=str(folder), tasks=FEW)
    save_file({"other": torch.zeros(1)}, folder / "mtl_lora.safetensors")
    edit_json(folder / "mtl_lora_config.json", weights_sha256=files.sha256(folder / "mtl_lora.safetensors"))
    with pytest.raises(UserError, match=r"numbers, but mtl_lora_config.json describes"):
        evaluate("out", checkpoint=str(folder), tasks=FEW)


def test_an_adapter_with_values_that_are_not_numbers_is_refused(evaluate, trained, tmp_path):
    folder = broken_checkpoint(trained, tmp_path / "broken", lambda state: state[NAME].fill_(float("nan")))
    with pytest.raises(UserError, match=f"{NAME} holds values that are not finite"):
        evaluate("out", checkpoint=folder, tasks=FEW)
    with pytest.raises(UserError, match=f"{NAME} holds values that are not finite"):
        export_peft(folder, tmp_path / "peft")


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_answers_of_logits_that_overflow_are_refused(evaluate, trained, tmp_path, mode):
    folder = broken_checkpoint(trained, tmp_path / "broken", lambda state: state[NAME].fill_(3e38))
    with pytest.raises(UserError, match=r"of boolq.* not (finite|numbers)|not numbers for questions of boolq"):
        evaluate("out", checkpoint=folder, tasks=["boolq"], mode=mode)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_checkpoint_of_another_base_model_is_refused(evaluate, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="another base model"):
        evaluate("out", base_model=str(other))


def test_a_gated_base_model_is_said_to_be_gated(evaluate, monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError
    from transformers.utils import hub

    def gated(*_, **__):
        raise GatedRepoError("403", response=httpx.Response(403, request=httpx.Request("GET", "https://example.org")))

    monkeypatch.setattr(hub, "hf_hub_download", gated)
    with pytest.raises(UserError, match=r"'org/gated' is gated.*log in"):
        evaluate("out", checkpoint=None, base_model="org/gated")


def test_greedy_answers_are_not_taken_for_those_of_beams(evaluate):
    evaluate("out", tasks=["boolq"], limit=1)
    with pytest.raises(UserError, match="another num_beams; pass another --output_dir"):
        evaluate("out", tasks=["boolq"], limit=1, num_beams=2)


def test_a_setting_that_only_the_earlier_answers_have_is_another(evaluate, tmp_path, edit_json):
    evaluate("out", tasks=["boolq"], limit=1)
    edit_json(tmp_path / "out" / "settings.json", load_in_4bit=True)  # which is recorded only where it is on
    with pytest.raises(UserError, match="another load_in_4bit"):
        evaluate("out", tasks=["boolq"], limit=1)


def test_a_task_that_is_named_twice_is_counted_once(evaluate):
    assert evaluate("out", tasks=["boolq", "boolq"])["generate"].tasks["boolq"].n == 4


def test_test_file_that_changes_while_it_is_read_is_refused(evaluate, tmp_path, monkeypatch):
    def replaced_before(path, *arguments, **options):
        write_test_set(tmp_path / "data", quickstart_test("boolq")[4:8])
        return load_examples(path, *arguments, **options)

    data = write_test_set(tmp_path / "data", quickstart_test("boolq")[:4])
    monkeypatch.setattr("mtl_lora.language.evaluate.load_examples", replaced_before)
    with pytest.raises(UserError, match=r"boolq/test\.json was changed while it was read"):
        evaluate("out", data_dir=data, tasks=["boolq"])
    assert not (tmp_path / "out" / "results.json").exists()
