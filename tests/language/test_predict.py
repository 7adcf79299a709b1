"""Predictions for any examples: the answers of an evaluation, in the order of the input, whatever the batches."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from shared import QUICKSTART

from mtl_lora import cli, files
from mtl_lora.data_files import read_values
from mtl_lora.errors import UserError
from mtl_lora.evaluation import Predictions
from mtl_lora.language import Predictor, answering
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import Evaluator
from mtl_lora.language.evaluate import run as evaluate


def questions(task: str, count: int = 6) -> list[dict]:
    """Instructions of the quick start's test set, under an id of their own."""
    records = json.loads((QUICKSTART / "test" / task / "test.json").read_text())[:count]
    return [{"id": f"{task}-{index}", "instruction": one["instruction"]} for index, one in enumerate(records)]


@pytest.fixture
def predict(trained, tmp_path):
    """Predict in this process: ``predict(examples, flag=value, ...)`` returns the lines of the output file."""

    def start(examples: list, **flags) -> list[dict]:
        path = tmp_path / "input.jsonl"
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
        given = {"checkpoint": trained, "input": str(path), "output": str(tmp_path / "out.jsonl"), "dtype": "fp32"}
        given |= {"max_new_tokens": 6} | flags
        cli.predict([f"--{name}={value}" for name, value in given.items()])
        return [json.loads(line) for line in Path(given["output"]).read_text().split("\n") if line]

    return start


@pytest.mark.slow(1)
@pytest.mark.parametrize("mode", ["score", "generate"])
def test_predictions_are_the_answers_of_an_evaluation(predict, trained, tmp_path, mode):
    flags = {"data_dir": str(QUICKSTART / "test"), "tasks": ["ARC-Easy"], "limit": 6, "max_new_tokens": 6}
    evaluate(EvalConfig(checkpoint=trained, output_dir=str(tmp_path / "eval"), mode=mode, dtype="fp32", **flags))
    lines = Predictions(tmp_path / "eval").read()
    results = predict(questions("ARC-Easy"), task="ARC-Easy", mode=mode)
    assert [one["id"] for one in results] == [f"ARC-Easy-{index}" for index in range(6)]
    for index, one in enumerate(results):
        line = lines["ARC-Easy", index]
        assert (one["index"], one["task"], one["answer"]) == (index, "ARC-Easy", line["parsed"])
        if mode == "generate":
            assert one["text"] == line["text"] and "scores" not in one
            continue
        assert list(one["scores"].values()) == pytest.approx(line["scores"], abs=1e-4)
        assert list(one["scores"])[:2] == ["answer1", "answer2"]
        total = sum(map(math.exp, line["scores"]))
        assert list(one["probabilities"].values()) == pytest.approx([math.exp(x) / total for x in line["scores"]])


@pytest.mark.slow(1)
def test_batches_and_mixed_tasks_change_no_answer_and_no_order(predict, tmp_path):
    mixed = [{**one, "task": task} for pair in zip(questions("boolq"), questions("piqa"), strict=True)
             for one, task in zip(pair, ("boolq", "piqa"), strict=True)]  # fmt: skip
    by_size = [predict(mixed, batch_size=size, output=str(tmp_path / f"{size}.jsonl")) for size in (1, 3, "auto")]
    alone = [predict(questions(task), task=task, output=str(tmp_path / task)) for task in ("boolq", "piqa")]
    for results in by_size:
        assert [one["id"] for one in results] == [one["id"] for one in mixed]
        for task, expected in zip(("boolq", "piqa"), alone, strict=True):
            found = [one for one in results if one["task"] == task]
            assert [one["answer"] for one in found] == [one["answer"] for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def test_python_gives_the_lines_of_the_command(predict, trained):
    predictor = Predictor(trained, dtype="fp32", max_new_tokens=6)
    for _ in range(2):  # the model and the tokenizer stay loaded
        found = predictor.predict(questions("winogrande", 3), task="winogrande")
    expected = predict(questions("winogrande", 3), task="winogrande")
    for one, other in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)
        assert {**one, "scores": 0, "probabilities": 0} == {**other, "scores": 0, "probabilities": 0}
    (one,) = predictor.predict(["Is it? Answer format: true/false"], task="boolq", mode="generate")
    assert set(one) == {"index", "task", "answer", "text"}
    assert predictor.predict([]) == []
    with pytest.raises(UserError, match=r"mode .* 'both'"):
        predictor.predict(["a"], task="boolq", mode="both")


def test_base_model_alone_answers_own_tasks_each_in_its_way(tiny_base, tmp_path):
    tasks = [{"name": "mood", "id": 0, "options": ["glad", "sad"]}, {"name": "free", "id": 1}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    predictor = Predictor(base_model=tiny_base, tasks_file=str(tmp_path / "tasks.json"), max_new_tokens=3)
    found = predictor.predict([{"instruction": "A", "task": "free"}, {"instruction": "B", "task_id": 0, "input": None}])
    assert [set(one) & {"scores", "text"} for one in found] == [{"text"}, {"scores"}]
    assert set(found[1]["scores"]) == {"glad", "sad"} and found[1]["answer"] in ("glad", "sad")


@pytest.mark.slow(1)
def test_first_requests_in_several_threads_load_the_model_once(trained, monkeypatch):
    examples, loaded, build = questions("boolq", 2), [], Evaluator.build
    expected = Predictor(trained, dtype="fp32").predict(examples, task="boolq")
    monkeypatch.setattr(Evaluator, "build", lambda self: loaded.append(self) or build(self))
    predictor, start = Predictor(trained, dtype="fp32"), threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lambda _: start.wait() >= 0 and predictor.predict(examples, task="boolq"), range(4))]
    assert found == [expected] * 4 and len(loaded) == 1


@pytest.mark.slow(1)
def test_after_a_failed_load_the_next_request_loads_anew(trained, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("no memory")

    predictor = Predictor(trained, dtype="fp32")
    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(answering, "reads_padding", out_of_memory)
        predictor.predict(questions("boolq", 1), task="boolq")
    assert predictor.predict(questions("boolq", 1), task="boolq")[0]["scores"]


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"instruction": "a", "answer": "true", "output": 5}\n\n{"instruction": "b"}\n\n',
        b'[{"instruction": "a"}, {"instruction": "b", "input": null}]',
    ],
    ids=["JSON lines with a BOM, blank lines and answers that are not needed", "a JSON list"],
)
def test_input_is_read_as_people_write_it(predict, tmp_path, content):
    (tmp_path / "given.json").write_bytes(content)
    results = predict([], input=str(tmp_path / "given.json"), task="boolq")
    assert [(one["index"], set(one["scores"])) for one in results] == [(0, {"true", "false"}), (1, {"true", "false"})]


def test_fields_of_an_example_replace_none_of_its_answer(predict):
    own = {"id": "a", "index": 7, "scores": "mine", "probabilities": "mine"}
    written, chosen = (
        predict([{"instruction": "a", **own}], task="boolq", mode=mode, overwrite=True)[0]
        for mode in ("generate", "score")
    )
    assert (written["id"], written["index"]) == (chosen["id"], chosen["index"]) == ("a", 0)
    assert not {"scores", "probabilities"} & set(written) and list(chosen["scores"]) == ["true", "false"]


def test_second_prediction_to_an_output_is_refused_and_so_is_an_input_that_changes(predict, tmp_path, monkeypatch):
    with files.claimed(tmp_path / "out.jsonl"), pytest.raises(UserError, match="in use"):
        predict([{"instruction": "a"}], task="boolq")

    def replaced_before(path):
        path.write_text('{"instruction": "b"}')
        return read_values(path)

    monkeypatch.setattr("mtl_lora.evaluation.run.read_values", replaced_before)
    with pytest.raises(UserError, match=r"input\.jsonl was changed while it was read"):
        predict([{"instruction": "a"}], task="boolq")
    assert not (tmp_path / "out.jsonl").exists()


def test_what_lies_beside_the_answers_neither_goes_nor_lets_them_be_replaced(predict, tmp_path):
    """A file that a file manager left in the folder of the answers before they were whole."""
    other = tmp_path / "out.jsonl.partial" / ".DS_Store"
    other.parent.mkdir()
    other.write_text("mine")
    predict([{"instruction": "a"}], task="boolq")
    before = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(UserError, match=r"out.jsonl already exists"):
        predict([{"instruction": "b"}], task="boolq")
    assert (tmp_path / "out.jsonl").read_text() == before and other.read_text() == "mine"


@pytest.mark.slow(1)
def test_interrupted_prediction_resumes_under_the_same_settings_alone(predict, tmp_path, monkeypatch):
    examples, answer, answered = questions("boolq"), Evaluator.answer, []
    complete = predict(examples, task="boolq", batch_size=2, output=str(tmp_path / "complete.jsonl"))

    def stop_after_four(self, batch, protocol):
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.extend(batch)
        return answer(self, batch, protocol)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "answer", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            predict(examples, task="boolq", batch_size=2)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError, match=r"out.jsonl.partial holds answers given with another mode; .*--overwrite"):
        predict(examples, task="boolq", batch_size=2, mode="generate")
    with pytest.raises(UserError, match="input_sha256"):
        predict(examples[:3], task="boolq", batch_size=2)
    (tmp_path / "out.jsonl.partial" / ".settings.json.abcdefgh.partial").touch()  # of a kill while it was written
    monkeypatch.setattr(Evaluator, "answer", lambda self, *batch: answered.extend(batch[0]) or answer(self, *batch))
    assert predict(examples, task="boolq", batch_size=2) == complete
    assert len(answered) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["complete.jsonl", "input.jsonl", "out.jsonl"]
    with pytest.raises(UserError, match=r"out.jsonl already exists; .*--overwrite"):
        predict(examples, task="boolq")
    assert predict(examples[:1], task="boolq", overwrite=True)[0]["answer"] == complete[0]["answer"]


def test_questions_that_are_shortened_are_counted(predict, capsys):
    long = {"instruction": "word " * 400}
    predict([*questions("boolq", 2), long], task="boolq")
    assert "1 of 3 questions are longer than the cutoff and were shortened\n" in capsys.readouterr().err
    predict(questions("boolq", 2), task="boolq", overwrite=True)
    assert "shortened" not in capsys.readouterr().err
