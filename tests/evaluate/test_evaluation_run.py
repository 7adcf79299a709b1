"""Evaluation runs: what they write, that the batch size does not matter, that they resume and refuse."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import PROJECT, QUICKSTART, free_port

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.export.peft_format import export_peft
from mtl_lora.language import evaluate as run_module
from mtl_lora.language.predictions import Predictions


def lines(folder: Path) -> list[dict]:
    found = []
    for path in sorted((folder / "predictions").glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_results_say_what_was_measured_and_how(evaluate, tmp_path, mode):
    results = evaluate("out", mode=mode)
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["method"] == "mtl_lora"
    assert len(results["tasks"]) == 8
    assert all(task["n"] == 4 and task["stderr"] >= 0 for task in results["tasks"].values())
    assert results["data"]["piqa"] == files.sha256(QUICKSTART / "test" / "piqa" / "test.json")
    assert results["settings"]["template"] == "alpaca"
    assert results["trainable"]["adapter"] > 0
    assert {"torch", "transformers", "python", "mtl_lora"} <= results["versions"].keys()
    found = lines(tmp_path / "out")
    assert len(found) == 32
    assert all(record["correct"] == (record["parsed"] == record["answer"]) for record in found)
    assert ("scores" in found[0]) == (mode == "score")


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_answers_do_not_depend_on_the_batch_size(evaluate, tmp_path, mode):
    for size in (1, 3, 16):
        evaluate(f"out{size}", mode=mode, batch_size=size)
    key = "parsed" if mode == "score" else "text"
    answers = [[record[key] for record in lines(tmp_path / f"out{size}")] for size in (1, 3, 16)]
    assert answers[0] == answers[1] == answers[2]


def test_the_base_model_alone_is_scored_in_the_same_words(evaluate, tiny_base, tmp_path):
    results = evaluate("base", checkpoint=None, base_model=tiny_base)
    assert results["method"] is None and results["trainable"] is None
    evaluate("tuned")
    prompts = [[record["prompt_sha256"] for record in lines(tmp_path / name)] for name in ("base", "tuned")]
    assert prompts[0] == prompts[1]


def test_a_finished_evaluation_is_not_run_again(evaluate, monkeypatch):
    first = evaluate("out")
    monkeypatch.setattr(run_module.Evaluation, "load", lambda self: pytest.fail("the model was loaded again"))
    assert evaluate("out")["tasks"] == first["tasks"]


def test_an_evaluation_that_was_killed_goes_on_and_repairs_a_torn_line(evaluate, tmp_path, monkeypatch):
    whole = evaluate("whole")
    asked = []
    answer = run_module.Evaluation.answer

    def stop_after_two(self, questions, protocol):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return answer(self, questions, protocol)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Evaluation, "answer", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            evaluate("cut", batch_size=5)
    part = tmp_path / "cut" / "predictions" / "~part-0.jsonl"
    text = part.read_text()
    part.write_text(text[:-20])  # as a kill in the middle of a line leaves it
    asked_again = []

    def count(self, questions, protocol):
        asked_again.extend(question.key for question in questions)
        return answer(self, questions, protocol)

    monkeypatch.setattr(run_module.Evaluation, "answer", count)
    assert evaluate("cut", batch_size=5)["tasks"] == whole["tasks"]
    # The batch of the torn line is answered whole: 4 of the 8 that were there.
    assert len(asked_again) == 32 - 8 + 4
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_changed_test_set_is_answered_anew(evaluate, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(QUICKSTART / "test", data)
    before = evaluate("out", data_dir=str(data), tasks=["boolq"])
    records = json.loads((data / "boolq" / "test.json").read_text())
    for record in records:
        record["answer"] = {"true": "false", "false": "true"}[record["answer"]]
    (data / "boolq" / "test.json").write_text(json.dumps(records))
    after = evaluate("out", data_dir=str(data), tasks=["boolq"])
    assert after["data"] != before["data"]
    assert after["tasks"]["boolq"]["correct"] <= 4 - before["tasks"]["boolq"]["correct"]


def test_another_adapter_or_setting_does_not_mix_with_earlier_results(evaluate, tiny_base):
    evaluate("out")
    with pytest.raises(UserError, match="results with another max_new_tokens; pass another --output_dir"):
        evaluate("out", max_new_tokens=9)
    with pytest.raises(UserError, match="another adapter_sha256"):
        evaluate("out", checkpoint=None, base_model=tiny_base)
    evaluate("out", max_new_tokens=9, overwrite=True)


def test_gathered_lines_of_an_earlier_data_set_never_win_over_new_ones(evaluate, tmp_path):
    """Every task, for the order in which files are read depends on the task's name."""
    data = tmp_path / "data"
    shutil.copytree(QUICKSTART / "test", data)
    evaluate("out", data_dir=str(data))
    for path in data.glob("*/test.json"):
        records = json.loads(path.read_text())
        path.write_text(json.dumps(records[4:]))
    evaluate("out", data_dir=str(data))
    evaluate("fresh", data_dir=str(data))
    assert lines(tmp_path / "out") == lines(tmp_path / "fresh")


def test_line_breaks_of_other_scripts_do_not_tear_a_prediction(tmp_path):
    record = {"task": "own", "index": 0, "text": "a\u2028b\u0085c"}
    predictions = Predictions(tmp_path)
    predictions.append([record])
    predictions.close()
    assert list(predictions.gather().values()) == [record]
    assert list(predictions.read().values()) == [record]


def test_both_protocols_run_one_after_the_other_and_their_agreement_is_counted(evaluate, tmp_path):
    both = evaluate("both", mode="both")
    for mode in ("generate", "score"):
        assert both[mode]["tasks"] == evaluate(mode, mode=mode)["tasks"]
        assert json.loads((tmp_path / "both" / mode / "results.json").read_text()) == both[mode]
    generated, scored = (lines(tmp_path / "both" / mode) for mode in ("generate", "score"))
    same = [one["parsed"] == other["parsed"] for one, other in zip(generated, scored, strict=True)]
    assert both["agreement"]["all"] == sum(same) / 32
    assert both["agreement"]["n"] == 32
    assert json.loads((tmp_path / "both" / "agreement.json").read_text()) == both["agreement"]


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_a_shared_opening_changes_no_answer(evaluate, tmp_path, mode):
    evaluate("shared", mode=mode, limit=8)
    evaluate("alone", mode=mode, limit=8, share_opening=False)
    shared, alone = lines(tmp_path / "shared"), lines(tmp_path / "alone")
    for one, other in zip(shared, alone, strict=True):
        assert one.pop("scores", 0) == pytest.approx(other.pop("scores", 0), abs=1e-4)
        assert one == other


def test_beams_share_an_opening_too(evaluate, tmp_path):
    evaluate("shared", num_beams=3)
    evaluate("alone", num_beams=3, share_opening=False, batch_size=1)
    assert lines(tmp_path / "shared") == lines(tmp_path / "alone")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_peft_folder_gets_the_scores_of_the_checkpoint_it_came_from(evaluate, train, tmp_path, method):
    checkpoint = train("run", adapter_name=method, max_steps=3, learning_rate=3e-2)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["piqa"])
    here = evaluate("here", checkpoint=str(checkpoint), mode="score", tasks=["piqa", "boolq"])
    there = evaluate("there", checkpoint=None, peft=str(folder), mode="score", tasks=["piqa", "boolq"])
    assert there["tasks"] == here["tasks"]
    assert there["method"] == "peft_lora"
    assert there["trainable"] == here["trainable"]
    for one, other in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_a_folder_that_is_no_peft_lora_is_refused(evaluate, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="has peft_type 'IA3'; only LORA"):
        evaluate("out", checkpoint=None, peft=str(folder))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors; other formats, such as \.bin"):
        evaluate("out", checkpoint=None, peft=str(folder))


@pytest.mark.parametrize("lines_before_the_kill", [1, 12, 31])
def test_a_run_that_is_killed_ends_with_the_predictions_of_one_that_was_not(
    evaluate, trained, tmp_path, lines_before_the_kill
):
    evaluate("whole", mode="score", batch_size=2)
    flags = {"checkpoint": trained, "data_dir": QUICKSTART / "test", "limit": 4, "dtype": "fp32", "mode": "score"}
    flags |= {"output_dir": tmp_path / "cut", "batch_size": 2}
    command = [sys.executable, "commonsense_evaluate.py", *(f"--{name}={value}" for name, value in flags.items())]
    part = tmp_path / "cut" / "predictions" / "~part-0.jsonl"
    running = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= lines_before_the_kill):
        time.sleep(0.001)
    running.kill()
    running.wait()
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_two_processes_share_the_questions_and_agree_with_one(evaluate, trained, tmp_path):
    whole = evaluate("one", mode="score")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    flags = {"checkpoint": trained, "data_dir": QUICKSTART / "test", "limit": 4, "dtype": "fp32", "mode": "score"}
    flags["output_dir"] = tmp_path / "two"
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    # torchrun would give each process one thread, and sums are rounded otherwise with another number of threads.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, "commonsense_evaluate.py", *arguments],
        cwd=PROJECT,
        env=threads,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "two" / "results.json").read_text())["tasks"] == whole["tasks"]
    # The very scores: the batches are the same, whoever answers them.
    assert lines(tmp_path / "two") == lines(tmp_path / "one")
    assert "Average" in done.stdout


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(NAME), f"lacks {NAME}"),
        (lambda state: state.update({"extra": state[NAME].clone()}), "has unknown extra"),
        (lambda state: state.update({NAME: state[NAME][:, :3].contiguous()}), f"{NAME} has shape"),
    ],
    ids=["missing", "extra", "wrong shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(evaluate, trained, tmp_path, change, message):
    folder = broken_checkpoint(trained, tmp_path / "broken", change)
    with pytest.raises(UserError, match=message):
        evaluate("out", checkpoint=folder)


def test_a_checkpoint_of_another_base_model_is_refused(evaluate, tiny_base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="trained on another base model"):
        evaluate("out", base_model=str(other))


def write_test_set(folder: Path, records: object) -> str:
    (folder / "boolq").mkdir(parents=True)
    (folder / "boolq" / "test.json").write_text(records if isinstance(records, str) else json.dumps(records))
    return str(folder)


GOOD = {"instruction": "is it?", "input": "", "output": "the correct answer is true", "answer": "true"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ('[{"instruction"', "is not JSON"),
        ([GOOD, {**GOOD, "answer": "maybe"}], "record 1: the answer 'maybe' is not one of its options true/false"),
        ([{key: value for key, value in GOOD.items() if key != "answer"}], "record 0 has no field 'answer'"),
        ([], "holds no records"),
    ],
)
def test_a_broken_test_file_is_refused_by_file_and_record(evaluate, tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        evaluate("out", data_dir=write_test_set(tmp_path / "data", records), tasks=["boolq"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": ["chess"]}, "there is no task 'chess'; the tasks are boolq 0"),
        ({"data_dir": "nowhere"}, "there is no test file nowhere"),
        ({"checkpoint": "nowhere"}, "nowhere is no MTL-LoRA checkpoint"),
        ({"checkpoint": None}, "pass --checkpoint DIR, --peft DIR, or --base_model NAME"),
        ({"mode": "guess"}, "mode must be one of generate, score"),
        ({"template": "original"}, "--template goes without --checkpoint"),
        ({"batch_size": 0}, "batch_size must be at least 1, or auto"),
        ({"batch_size": "many"}, "batch_size must be at least 1, or auto, not 'many'"),
        ({"peft": "nowhere"}, "--checkpoint and --peft are two adapters"),
        ({"checkpoint": None, "peft": "nowhere"}, "the PEFT configuration nowhere"),
    ],
)
def test_a_wrong_flag_is_refused(evaluate, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate("out", **flags)


def test_the_command_ends_with_one_sentence_and_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "commonsense_evaluate.py", "--checkpoint", str(tmp_path)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
