"""Evaluation and prediction on images and texts: as a model that answers one question at a time, by hand."""

import base64
import html
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from good_inputs import run
from image_text_cases import TASKS
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig

import mtl_lora
from mtl_lora.errors import UserError
from mtl_lora.image_text import Predictor
from mtl_lora.image_text.config import AnswerConfig
from mtl_lora.image_text.evaluate import Evaluator, Question
from mtl_lora.image_text.examples import Example, parse_example
from mtl_lora.image_text.features import FeatureStore
from mtl_lora.image_text.page import evenly
from mtl_lora.image_text.tasks import TaskSet
from mtl_lora.metrics import vqa_accuracy
from mtl_lora.results import Results

KINDS = ["bart", "causal"]
ASKED = 4  # questions of a task that are written one by one


def evaluated(folder: Path, *arguments: str) -> dict[str, list[dict]]:
    """The prediction lines of an evaluation by task."""
    flags = ["--dtype=fp32", "--caption_tokenizer=simple", f"--output_dir={folder}"]
    done = run(["evaluate", *flags, *arguments])
    assert done.code == 0, done.err
    files = (folder / "predictions").glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


@pytest.fixture(scope="module")
def answered(trained, pictures, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """By kind, an evaluation with batches as they come: its folder and lines."""
    root, data = tmp_path_factory.mktemp("evaluation"), f"--data_dir={pictures / 'test'}"
    return {kind: (root / kind, evaluated(root / kind, f"--checkpoint={trained[kind]}", data)) for kind in KINDS}


def questions(pictures: Path, task: str) -> list[dict]:
    return json.loads((pictures / "test" / task / "test.json").read_text())


class OneAtATime:
    """A model that is asked one question, without padding, token by token; shown: images in place of the example's."""

    def __init__(self, folder: str, base: str, pictures: Path):
        self.model = mtl_lora.load(folder, dtype="fp32").eval()
        self.tokenizer, self.store = AutoTokenizer.from_pretrained(base), FeatureStore([pictures / "features.h5"])
        self.decodes = self.model.config.is_encoder_decoder

    def inputs(self, example: dict, images: list[str] | None) -> dict:
        task = next(task for task in TASKS if task["name"] == example["task"])
        prompt = task["prompt"].replace("{text}", example.get("text", ""))
        inputs = {"input_ids": self.tokenizer(prompt, return_tensors="pt")["input_ids"], "task_ids": [task["name"]]}
        if images is None:
            own = example["image"]
            images = own if isinstance(own, list) else [own]
        return inputs | ({"features": torch.stack([self.store[image] for image in images])[None]} if images else {})

    @torch.no_grad()
    def logits(self, inputs: dict, said: list[int]) -> torch.Tensor:
        """Of each token of what is said and of the one behind it, (len(said) + 1, V)."""
        if self.decodes:
            start = [self.model.config.decoder_start_token_id, self.tokenizer.bos_token_id]
            logits = self.model(**inputs, decoder_input_ids=torch.tensor([start + said])).logits[0]
        else:
            ids = torch.cat([inputs["input_ids"], torch.tensor([said], dtype=torch.long)], dim=1)
            logits = self.model(**{**inputs, "input_ids": ids}).logits[0]
        return logits[len(logits) - len(said) - 1 :]

    def written(self, example: dict, images: list[str] | None = None) -> str:
        """The greedy answer."""
        task = next(task for task in TASKS if task["name"] == example["task"])
        inputs, said = self.inputs(example, images), []
        for _ in range(task["max_answer"] - self.decodes):  # of which BOS is one
            said.append(int(self.logits(inputs, said)[-1].argmax()))
            if said[-1] == self.tokenizer.eos_token_id:
                break
        return " ".join(self.tokenizer.decode(said, skip_special_tokens=True).split())

    def scores(self, example: dict, labels: list[str], images: list[str] | None = None) -> list[list[float]]:
        """Of each label the log-probabilities of its tokens and EOS."""
        inputs, found = self.inputs(example, images), []
        for label in labels:
            ids = self.tokenizer(label if self.decodes else f" {label}", add_special_tokens=False)["input_ids"]
            ids = [*ids, self.tokenizer.eos_token_id]
            steps = self.logits(inputs, ids[:-1]).log_softmax(dim=-1)
            found.append([step[token].item() for step, token in zip(steps, ids, strict=True)])
        return found


@pytest.fixture(scope="module")
def alone(trained, bart, causal, pictures) -> dict[str, OneAtATime]:
    return {kind: OneAtATime(trained[kind], base, pictures) for kind, base in zip(KINDS, (bart, causal), strict=True)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_answers_are_those_of_one_question_at_a_time_whatever_the_batch(
    kind, answered, alone, trained, pictures, tmp_path
):
    _, lines = answered[kind]
    data = [f"--checkpoint={trained[kind]}", f"--data_dir={pictures / 'test'}"]
    one = evaluated(tmp_path / "one", *data, "--batch_size=1")
    for name in ("vqa", "caption"):
        expected = [alone[kind].written(example) for example in questions(pictures, name)[:ASKED]]
        assert [line["parsed"] for line in lines[name][:ASKED]] == expected
        assert [line["parsed"] for line in one[name]] == [line["parsed"] for line in lines[name]]
    assert len({line["parsed"] for line in lines["vqa"] + lines["caption"]}) > 1
    for example, *found in zip(questions(pictures, "nlvr"), lines["nlvr"], one["nlvr"], strict=True):
        scores = [sum(each) for each in alone[kind].scores(example, ["false", "true"])]
        for line in found:
            assert line["scores"] == pytest.approx(scores, abs=1e-4)
            assert line["parsed"] == ["false", "true"][scores[1] > scores[0]]


@pytest.mark.slow(1)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_the_lines_by_hand(kind, answered, pictures):
    folder, lines = answered[kind]
    found = Results.load(folder)
    said = [
        (line["parsed"], example["answers"])
        for line, example in zip(lines["vqa"], questions(pictures, "vqa"), strict=True)
    ]
    assert found.tasks["vqa"].value == pytest.approx(sum(vqa_accuracy(*each) for each in said) / 9)
    right = [
        line["parsed"] == each["answer"] for line, each in zip(lines["nlvr"], questions(pictures, "nlvr"), strict=True)
    ]
    nlvr = found.tasks["nlvr"]
    assert (nlvr.value, nlvr.n, nlvr.measured["correct"]) == (pytest.approx(sum(right) / 9), 9, sum(right))
    wanted = [each["answer"] for each in questions(pictures, "nlvr")]
    assert nlvr.majority == max(wanted.count(label) for label in ("true", "false")) / 9
    whole = [all(right[start : start + 3]) for start in (0, 3, 6)]  # statements of one group
    assert (nlvr.others["consistency"].value, nlvr.others["consistency"].n) == (pytest.approx(sum(whole) / 3), 3)
    caption = found.tasks["caption"]
    assert caption.metric == "bleu4" and caption.majority is None and caption.measured["tokenizer"] == "simple"
    assert caption.others["cider"].value == pytest.approx(sum(line["cider"] for line in lines["caption"]) / 9)
    assert [line["answers"] for line in lines["caption"]] == [
        each["answers"] for each in questions(pictures, "caption")
    ]
    assert found.settings["images"] == "own" and found.settings["features"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_ablations_show_another_image_or_none_and_are_never_taken_for_the_real_thing(
    kind, answered, alone, trained, pictures, tmp_path
):
    folder, own = answered[kind]
    data = [f"--checkpoint={trained[kind]}", f"--data_dir={pictures / 'test'}", "--tasks=nlvr,vqa"]
    lines = evaluated(tmp_path / "none", *data, "--no_images")
    for example, line in zip(questions(pictures, "nlvr"), lines["nlvr"], strict=True):
        expected = [sum(each) for each in alone[kind].scores(example, ["false", "true"], images=[])]
        assert line["scores"] == pytest.approx(expected, abs=1e-4)
    assert [line["parsed"] for line in lines["vqa"][:ASKED]] == [
        alone[kind].written(example, images=[]) for example in questions(pictures, "vqa")[:ASKED]
    ]
    lines = evaluated(tmp_path / "shuffled", *data, "--shuffle_images")
    others = {}
    for example, line, right in zip(questions(pictures, "nlvr"), lines["nlvr"], own["nlvr"], strict=True):
        if isinstance(example["image"], str):
            scores = {
                image: [sum(each) for each in alone[kind].scores(example, ["false", "true"], [image])]
                for image in alone[kind].store
            }
            (shown,) = [image for image, found in scores.items() if found == pytest.approx(line["scores"], abs=1e-4)]
            assert shown != example["image"] and line["scores"] != pytest.approx(right["scores"], abs=1e-4)
            assert others.setdefault(example["image"], shown) == shown
    assert len(set(others.values())) == len(others) > 1
    # A part of the questions are shown the same images.
    part = evaluated(tmp_path / "part", *data, "--shuffle_images", "--limit=3")
    assert part["nlvr"] == [line | {"scores": pytest.approx(line["scores"], abs=1e-4)} for line in lines["nlvr"][:3]]
    for name, images in {"none": "none", "shuffled": "shuffled, seed 0"}.items():
        found = Results.load(tmp_path / name)
        assert found.settings["images"] == images and found.name.endswith(
            f"{images.partition(',')[0].replace('none', 'no')} images"
        )
        done = run(["report", "compare", str(folder), str(tmp_path / name)])
        assert done.code == 2 and "images" in done.sentence
    done = run(["evaluate", *data, f"--output_dir={folder}", "--no_images", "--dtype=fp32"])
    assert done.code == 2 and "another features, images" in done.sentence


@pytest.mark.slow(1)
def test_the_official_choice_is_by_the_first_token_behind_bos(alone, trained, pictures, tmp_path):
    data = [f"--checkpoint={trained['bart']}", f"--data_dir={pictures / 'test'}", "--tasks=nlvr"]
    lines = evaluated(tmp_path / "official", *data, "--official")
    for example, line in zip(questions(pictures, "nlvr"), lines["nlvr"], strict=True):
        first = [each[0] for each in alone["bart"].scores(example, ["false", "true"])]
        assert line["scores"] == pytest.approx(first, abs=1e-4)
    with pytest.raises(UserError, match="--official"):
        Predictor(trained["causal"], official=True)


@pytest.mark.slow(1)
@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_searched_by_beams_and_open_answers_never(kind, answered, alone, trained, pictures, tmp_path):
    one, example = alone[kind], questions(pictures, "caption")[2]
    found = Predictor(trained[kind], num_beams=3, dtype="fp32").predict(
        [{"task": "caption", "image": example["image"]}, *questions(pictures, "caption")[3:]]
    )
    settings = GenerationConfig(num_beams=3, max_new_tokens=12 - one.decodes, eos_token_id=one.tokenizer.eos_token_id)
    settings.pad_token_id = 0
    settings.decoder_start_token_id = getattr(one.model.config, "decoder_start_token_id", None)
    inputs = one.inputs(example, None)
    mask = torch.ones(1, inputs["input_ids"].shape[1] + 4, dtype=torch.long)
    start = {"decoder_input_ids": torch.tensor([[settings.decoder_start_token_id, 0]])} if one.decodes else {}
    one.model.generation_config = GenerationConfig()
    ids = one.model.generate(**inputs, **start, attention_mask=mask, generation_config=settings)[0]
    assert found[0]["answer"] == " ".join(one.tokenizer.decode(ids, skip_special_tokens=True).split())
    vqa = Predictor(trained[kind], num_beams=3, dtype="fp32").predict(questions(pictures, "vqa"))
    assert [each["answer"] for each in vqa] == [line["parsed"] for line in answered[kind][1]["vqa"]]


@pytest.mark.slow(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_answers_as_the_evaluation_does(kind, answered, trained, pictures, tmp_path):
    _, lines = answered[kind]
    records = [record for task in TASKS for record in questions(pictures, task["name"])]
    asked = [{key: value for key, value in record.items() if not key.startswith("answer")} for record in records]
    asked = [each | {"index": 99, "scores": "his own", "page": 7} for each in asked]  # of these the last alone stays
    (tmp_path / "in.json").write_text(json.dumps(asked))
    flags = [f"--checkpoint={trained[kind]}", f"--input={tmp_path / 'in.json'}", f"--output={tmp_path / 'out'}"]
    done = run(["predict", *flags, "--batch_size=5", "--dtype=fp32"])
    assert done.code == 0, done.err
    assert Predictor(trained[kind], features=[str(pictures / "features.h5")]).predict([]) == []
    found = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    expected = [line for task in TASKS for line in lines[task["name"]]]
    assert [each["answer"] for each in found] == [line["parsed"] for line in expected]
    assert [each["index"] for each in found] == list(range(len(records)))
    assert [each["image"] for each in found] == [record["image"] for record in records]
    for each, line in zip(found, expected, strict=True):
        assert each["page"] == 7 and ("scores" in each, each.get("text")) == ("scores" in line, line.get("text"))
        if "scores" in each:
            assert list(each["scores"].values()) == pytest.approx(line["scores"], abs=1e-4)
            weights = [math.exp(score - max(line["scores"])) for score in line["scores"]]
            assert each["probabilities"]["true"] == pytest.approx(weights[1] / sum(weights), abs=1e-4)


def test_a_model_generates_by_nothing_that_its_base_says(bart, pictures, tmp_path):
    base = shutil.copytree(bart, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0, "suppress_tokens": [5]}))
    flags = {"tasks_file": str(pictures / "tasks.json"), "no_images": True, "dtype": "fp32"}
    model = Evaluator(AnswerConfig(base_model=str(base), **flags)).build()
    assert model.generation_config.to_diff_dict() == GenerationConfig().to_diff_dict()


def test_a_page_has_questions_from_all_over():
    tasks = TaskSet.from_json(TASKS)
    asked = [SimpleNamespace(task=task, place=place) for task in tasks for place in range(10 + task.id)]
    chosen = [(each.task.id, each.place) for each in evenly(tasks, asked, 7)]
    assert chosen == [(0, 0), (0, 3), (0, 6), (1, 0), (1, 5), (2, 0), (2, 6)]


def test_a_shuffled_image_is_another_one_and_none_of_its_neighbours():
    """Whose ids may say that they are of one statement."""
    ids = [f"{number:02}" for number in range(40)]
    asked = [Example((image,), "", {}, 0, 0) for image in ids]
    found = []
    for examples in (asked, asked[::-1]):
        evaluator = SimpleNamespace(others={}, tasks=None)
        Evaluator.shuffle(evaluator, examples)
        found.append(evaluator.others[0])
    assert found[0] == found[1] and sorted(found[0].values()) == ids
    away = [abs(int(image) - int(other)) for image, other in found[0].items()]
    assert min(away) > 0 and sum(each == 1 for each in away) < 8


def test_a_text_is_cut_where_the_training_cut_it(trained, pictures, tmp_path):
    path = Path(shutil.copytree(trained["bart"], tmp_path / "cut")) / "mtl_lora_config.json"
    written = json.loads(path.read_text())
    written["provenance"]["cutoff_len"] = 20
    path.write_text(json.dumps(written))
    evaluator = Predictor(path.parent, features=[str(pictures / "features.h5")]).evaluator
    assert evaluator.encoder.cutoff_len == evaluator.settings("answer")["cutoff_len"] == 20


def test_a_question_about_another_picture_is_another_question(trained, pictures):
    evaluator = Predictor(trained["bart"], features=[str(pictures / "features.h5")]).evaluator
    asked = [{"image": image, "text": "what is it?"} for image in ("p0", "p1", "p0")]
    first, other, again = (each.prompt_sha256 for each in evaluator.to_predict(asked, "input", "vqa")["answer"])
    assert first == again != other


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_model_alone_reads_the_text(kind, bart, causal, pictures, tmp_path):
    flags = ["--system=image_text", f"--base_model={dict(zip(KINDS, (bart, causal), strict=True))[kind]}"]
    flags += [f"--tasks_file={pictures / 'tasks.json'}", f"--data_dir={pictures / 'test'}", "--no_images"]
    lines = evaluated(tmp_path / "base", *flags, "--limit=4")
    assert {name: len(part) for name, part in lines.items()} == {"vqa": 4, "nlvr": 4, "caption": 4}
    found = Results.load(tmp_path / "base")
    assert found.method is None and found.settings["images"] == "none" and found.name.endswith(", no images")


@pytest.mark.slow(1)
def test_runs_are_compared_by_soft_accuracy_and_by_captions(answered, trained, pictures, tmp_path):
    folder, lines = answered["bart"]
    data = [f"--checkpoint={trained['bart']}", f"--data_dir={pictures / 'test'}"]
    evaluated(tmp_path / "again", *data)
    path = tmp_path / "again" / "predictions" / "vqa.jsonl"
    changed = [line | {"parsed": line["answer"], "score": 1.0} for line in lines["vqa"]]
    path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    value = json.loads((tmp_path / "again" / "results.json").read_text())
    value["tasks"]["vqa"]["value"] = 1.0
    value.pop("average")
    (tmp_path / "again" / "results.json").write_text(json.dumps(value))
    done = run(["report", "compare", str(folder), str(tmp_path / "again")])
    assert done.code == 0, done.err
    assert "VQA accuracy" in done.out and "BLEU-4" in done.out
    value["tasks"]["caption"]["tokenizer"] = "ptb"
    (tmp_path / "again" / "results.json").write_text(json.dumps(value))
    done = run(["report", "compare", str(folder), str(tmp_path / "again")])
    assert done.code == 2 and "tokenizers" in done.sentence


def test_scores_that_are_not_finite_are_no_answer(trained):
    for task, words in (("nlvr", "question 0 of nlvr has the scores"), ("vqa", "questions of vqa")):
        predictor = Predictor(trained["bart"], dtype="fp32")
        predictor.evaluator.load()
        predictor.evaluator.model.model.shared.weight.data.fill_(torch.nan)
        with pytest.raises(UserError, match=words):
            predictor.predict([{"image": "p0", "text": "red?"}], task=task)


def test_a_page_shows_pictures_from_all_over_the_test_sets_with_what_is_right_and_what_was_said(
    answered, trained, pictures, tmp_path
):
    folder, lines = answered["causal"]
    shown = tmp_path / "pictures"
    shown.mkdir()
    for index, image in enumerate(FeatureStore([pictures / "features.h5"])):
        Image.new("RGB", (300, 20), (index % 256, 0, 0)).save(shown / f"{image}.png")
    (shown / "of no question.png").write_bytes(b"is not opened")
    flags = [f"--checkpoint={trained['causal']}", f"--data_dir={pictures / 'test'}", "--dtype=fp32"]
    flags += ["--caption_tokenizer=simple", f"--output_dir={folder}", "--page=9", f"--pictures={shown}"]
    before = (folder / "results.json").read_text()
    done = run(["evaluate", *flags])
    assert done.code == 0, done.err
    assert json.loads((folder / "results.json").read_text())["tasks"] == json.loads(before)["tasks"]
    figures = (folder / "pictures.html").read_text().split("<figure>")[1:]
    asked = [(task, example) for task in lines for example in questions(pictures, task)]
    titles = [figure.partition("<small>")[2].partition("</small>")[0] for figure in figures]
    assert len(figures) == 9 and {titles.count(title) for title in titles} <= {9 // len(lines), 9 // len(lines) + 1}
    for figure in figures:
        named = [(task, each) for task, each in asked if html.escape(each.get("text", "")) in figure]
        said = {html.escape(line["parsed"]) for task, _ in named for line in lines[task]}
        assert any(f">{text}</b>" in figure for text in said)
        (width, _), *rest = [
            Image.open(io.BytesIO(base64.b64decode(source.partition('"')[0]))).size
            for source in figure.split("base64,")[1:]
        ]
        assert width == 240 and len(rest) < 2
    (folder / "pictures.html").unlink()
    before = (folder / "results.json").read_bytes()
    for image in shown.iterdir():
        image.write_bytes(image.read_bytes()[:-30])
    done = run(["evaluate", *flags, "--overwrite"])
    assert done.code == 2 and "is broken" in done.sentence and (folder / "results.json").read_bytes() == before
    for image in list(shown.iterdir())[1:]:
        image.unlink()
    done = run(["evaluate", *flags])
    assert done.code == 2 and "--pictures" in done.err and not (folder / "pictures.html").exists()


@pytest.mark.parametrize(("flag", "setting"), [("--official", "official"), ("--num_beams=2", "num_beams")])
def test_answers_given_in_another_way_do_not_mix(flag, setting, trained, pictures, tmp_path):
    data = [f"--checkpoint={trained['bart']}", f"--data_dir={pictures / 'test'}", "--tasks=nlvr", "--limit=1"]
    evaluated(tmp_path, *data)
    done = run(["evaluate", *data, "--dtype=fp32", f"--output_dir={tmp_path}", flag])
    assert done.code == 2 and f"another {setting};" in done.sentence


def test_a_line_is_scored_by_what_its_metric_compares_with():
    def line(said: str, metric: str = "", kind: int = 0, **record) -> dict:
        tasks = TaskSet.from_json([TASKS[kind] | {"id": 0} | ({"metric": metric} if metric else {})])
        example = parse_example({"image": "p0", **record}, 0, "FILE", tasks)
        return Question(tasks[0], example, [], "hash").line(said)

    people = ["box"] * 4 + ["ball"] * 6  # what they said goes before the scores that training knows
    asked = {"text": "what is it?", "answers": {"dog": 0.3}}
    found = line("Box.", **asked, annotators=people)
    assert (found["answers"], found["score"]) == (people, 1.0)
    assert line("dog", **asked)["score"] == 0.3
    found = line("The red box!", "exact_match", text="what is it?", answer="red box")
    assert (found["correct"], found["f1"]) == (True, 1.0)
    found = line("true", kind=1, text="a box.", answer="true")
    assert found["correct"] is True and "f1" not in found
    twice = ["a box", "a ball", "a box"]  # which counts twice among the references
    found = line("a box", kind=2, answers=twice)
    assert found["answers"] == twice and "correct" not in found
