"""Evaluation and prediction of encoders: whatever the batches, as scikit-learn, scipy and slow versions have it."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from good_inputs import run
from nlu_cases import LABELLED, SIZES, WORDS, make_tokenizer
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, matthews_corrcoef
from transformers import AutoTokenizer, BertModel, FNetConfig, FNetModel

import mtl_lora
from mtl_lora import AdapterConfig, language
from mtl_lora.adapter.checkpoint import read_config
from mtl_lora.base_model import BaseModel
from mtl_lora.errors import UserError
from mtl_lora.nlu import Predictor
from mtl_lora.nlu import model as heads
from mtl_lora.nlu.config import EvalConfig, PredictConfig, TrainConfig
from mtl_lora.nlu.evaluate import Evaluator


def evaluated(folder: Path, *arguments: str) -> dict[str, list[dict]]:
    """The prediction lines of an evaluation by task."""
    done = run(["evaluate", f"--output_dir={folder}", "--dtype=fp32", *arguments])
    assert done.code == 0, done.err
    files = (folder / "predictions").glob("*.jsonl")
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def answered(trained, glue, tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """An evaluation with batches as they come: its folder and lines."""
    folder = tmp_path_factory.mktemp("evaluation") / "auto"
    return folder, evaluated(folder, f"--checkpoint={trained}", f"--data_dir={glue / 'test'}")


@pytest.mark.slow(1)
def test_results_are_those_of_scikit_learn_and_scipy(answered, glue):
    folder, lines = answered
    targets = {
        task["name"]: [each["label"] for each in json.loads((glue / "test" / task["name"] / "test.json").read_text())]
        for task in LABELLED
    }
    assert {name: [line["answer"] for line in part] for name, part in lines.items()} == targets
    found = results(folder)["tasks"]
    parsed = {name: [line["parsed"] for line in part] for name, part in lines.items()}
    assert found["tone"]["value"] == pytest.approx(matthews_corrcoef(targets["tone"], parsed["tone"]))
    assert found["place"]["value"] == pytest.approx(accuracy_score(targets["place"], parsed["place"]))
    both = pearsonr(targets["closeness"], parsed["closeness"]).statistic
    both += spearmanr(targets["closeness"], parsed["closeness"]).statistic
    assert found["closeness"]["value"] == pytest.approx(both / 2)
    assert {name: task["n"] for name, task in found.items()} == {"tone": 12, "closeness": 12, "place": 12}
    assert len(set(parsed["tone"])) == 2 and len(set(parsed["place"])) > 1, "one label for all would compare little"
    # As MNLI's matched and mismatched are kept apart.
    for kind, group in found["place"]["groups"].items():
        own = [line["correct"] for line in lines["place"] if line["kind"] == kind]
        assert group["value"] == pytest.approx(sum(own) / len(own))
    assert found["place"]["groups"].keys() == {"odd", "even"}


@torch.no_grad()
@pytest.mark.slow
def test_answers_are_those_of_the_model_one_text_at_a_time(answered, trained, encoder, glue, tmp_path):
    _, lines = answered
    one = evaluated(tmp_path / "one", f"--checkpoint={trained}", f"--data_dir={glue / 'test'}", "--batch_size=1")
    model, tokenizer = mtl_lora.load(trained, dtype="fp32").eval(), AutoTokenizer.from_pretrained(encoder)
    for task in LABELLED:
        examples = json.loads((glue / "test" / task["name"] / "test.json").read_text())
        for example, line, alone in zip(examples, lines[task["name"]], one[task["name"]], strict=True):
            inputs = tokenizer(example["text"], example.get("text_b"), return_tensors="pt")
            logits = model(**inputs, task_ids=[task["name"]]).logits[0]
            for found in (line, alone):
                if "labels" in task:
                    assert found["scores"] == pytest.approx(logits[: len(task["labels"])].tolist(), abs=1e-4)
                    assert found["parsed"] == task["labels"][logits.argmax()]
                else:
                    low, high = task["regression"]
                    assert found["parsed"] == pytest.approx(low + (high - low) * logits[0].item(), abs=1e-4)


def test_an_encoder_without_a_trained_head_predicts_nothing():
    with pytest.raises(UserError, match="--checkpoint DIR"):
        PredictConfig(base_model="minilm-l6", input="pairs.jsonl", output="answers.jsonl")


def test_a_misspelt_flag_of_a_predictor_is_named_as_the_command_names_it():
    with pytest.raises(UserError, match=r"'batchsize'.*batch_size"):
        Predictor("run", batchsize=4)


@pytest.mark.slow
def test_a_prediction_answers_as_the_evaluation_does(answered, trained, glue, tmp_path):
    _, lines = answered
    for task in LABELLED:
        path = glue / "test" / task["name"] / "test.json"
        out = tmp_path / f"{task['name']}.json"
        done = run(
            [
                "predict",
                f"--checkpoint={trained}",
                f"--input={path}",
                f"--output={out}",
                "--batch_size=5",
                "--dtype=fp32",
            ]
        )
        assert done.code == 0, done.err
        written = [json.loads(line) for line in out.read_text().splitlines()]
        records = [{**record, "label": None} for record in json.loads(path.read_text())]
        for given in (written, Predictor(trained, dtype="fp32").predict(records)):
            assert [each["index"] for each in given] == list(range(len(records)))
            for found, line in zip(given, lines[task["name"]], strict=True):
                if "labels" in task:
                    assert found["answer"] == line["parsed"]
                    assert list(found["scores"].values()) == pytest.approx(line["scores"], abs=1e-4)
                    assert sum(found["probabilities"].values()) == pytest.approx(1)
                else:
                    assert found["answer"] == pytest.approx(line["parsed"], abs=1e-4)


@pytest.mark.slow(1)
def test_groups_of_a_test_set_that_were_changed_need_no_new_answers(trained, glue, tmp_path):
    data, folder = shutil.copytree(glue / "test", tmp_path / "test"), tmp_path / "answers"
    evaluated(folder, f"--checkpoint={trained}", f"--data_dir={data}")
    examples = json.loads((data / "place" / "test.json").read_text())
    (data / "place" / "test.json").write_text(json.dumps([{**example, "kind": "all"} for example in examples]))
    flags = f"--checkpoint={trained}", f"--data_dir={data}"
    assert {line["kind"] for line in evaluated(folder, *flags)["place"]} == {"all"}
    assert results(folder)["tasks"]["place"]["groups"].keys() == {"all"}


@pytest.mark.parametrize("examples", ["a fine day", {"text": "a fine day"}], ids=str)
def test_examples_are_a_list(trained, examples):
    with pytest.raises(UserError, match="a list of examples"):
        Predictor(trained, dtype="fp32").predict(examples, task="tone")


def test_an_example_may_be_any_mapping(trained):
    predictor = Predictor(trained, dtype="fp32")
    rows = [{"text": "a fine day"}, types.MappingProxyType({"text": "a fine day"})]
    one, other = predictor.predict(rows, task="tone")
    assert one["scores"] == pytest.approx(other["scores"])
    with pytest.raises(UserError, match="example 1 must be an object"):
        predictor.predict([rows[0], 5], task="tone")


@torch.no_grad()
def test_an_encoder_alone_answers_by_the_cosine_of_mean_pooled_embeddings(encoder, glue, tmp_path):
    flags = [f"--base_model={encoder}", f"--tasks_file={glue / 'tasks.json'}", f"--data_dir={glue / 'test'}"]
    lines = evaluated(tmp_path / "cosine", "--system=nlu", *flags, "--cutoff_len=32")
    assert lines.keys() == {"closeness"}, "what no head answers is not asked"
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    examples = json.loads((glue / "test" / "closeness" / "test.json").read_text())
    for example, line in zip(examples, lines["closeness"], strict=True):
        texts = [tokenizer(example[field], return_tensors="pt") for field in ("text", "text_b")]
        first, second = (model(**text).last_hidden_state[0].mean(dim=0) for text in texts)
        cosine = F.cosine_similarity(first, second, dim=0).item()
        assert line["parsed"] == pytest.approx(1 + 4 * cosine, abs=1e-5)
    found = results(tmp_path / "cosine")
    assert found["method"] is None and found["settings"]["cutoff_len"] == 32


@pytest.mark.slow(1)
@torch.no_grad()
def test_a_text_is_answered_without_padding_because_some_encoders_read_it(glue, tmp_path):
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_attention_heads"}
    encoder = FNetModel(FNetConfig(**sizes, type_vocab_size=2)).eval()  # it takes no mask
    encoder.save_pretrained(tmp_path / "fnet")
    make_tokenizer(tmp_path / "fnet")
    texts = [WORDS[3], " ".join(WORDS[:9]), " ".join(WORDS[9:12])]

    config = TrainConfig(base_model=str(tmp_path / "fnet"), tasks_file=str(glue / "tasks.json"))
    model = heads.load(BaseModel(config.base_model, kind="encoder"), config.task_set(), "fp32").eval()
    adapter = AdapterConfig("lora", target_modules="all-linear", tasks=config.task_set().names)
    mtl_lora.save(mtl_lora.inject(model, heads.in_encoder(adapter, model)), tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fnet")
    answers = Predictor(tmp_path / "adapter", dtype="fp32").predict(texts, task="place")
    for text, answer in zip(texts, answers, strict=True):
        alone = model(**tokenizer(text, return_tensors="pt"), task_ids=["place"]).logits[0, :3]
        assert [*answer["scores"].values()] == pytest.approx(alone.tolist(), abs=1e-5)

    evaluator = Evaluator(EvalConfig(base_model=config.base_model, tasks_file=config.tasks_file, data_dir="."))
    evaluator.load()
    embedded = evaluator._embeddings(texts)
    for text, found in zip(texts, embedded, strict=True):
        alone = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(found, alone)


def test_runs_that_cut_elsewhere_or_nobody_knows_where_are_not_compared(answered, edit_json, tmp_path):
    one, other = (shutil.copytree(answered[0], tmp_path / name) for name in ("one", "other"))
    settings = results(one)["settings"]
    unknown = {name: value for name, value in settings.items() if name != "cutoff_len"}
    for own, others in ((settings, settings | {"cutoff_len": 31}), (unknown, unknown)):
        assert run(["report", "compare", str(answered[0]), str(one)]).code == 0
        edit_json(one / "results.json", settings=own)
        edit_json(other / "results.json", settings=others)
        done = run(["report", "compare", str(one), str(other)])
        assert done.code == 2 and "cutoff_len" in done.sentence


def test_a_text_is_cut_where_the_training_cut_it(trained):
    assert read_config(trained).provenance_config.cutoff_len == 32
    evaluator = Predictor(trained, dtype="fp32").evaluator
    (question,) = evaluator.to_predict([{"text": "bab " * 50}], "input", "tone")["classify"]
    assert (len(question.prompt_ids), question.row["removed"]) == (32, 20)


def test_scores_that_are_not_finite_are_no_answer(trained):
    predictor = Predictor(trained, dtype="fp32")
    predictor.evaluator.load()
    next(predictor.evaluator.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(UserError, match=r"question 0 of tone has the scores .* not finite"):
        predictor.predict(["a fine day"], task="tone")


def test_a_checkpoint_of_another_system_is_refused(trained):
    with pytest.raises(UserError, match="of the system nlu, not language"):
        language.Predictor(trained)
