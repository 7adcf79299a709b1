"""docs/lm_eval: lm-evaluation-harness scores the options of every question as ``--mode score`` does."""

import importlib.util
import json
import math

import pytest
from shared import PROJECT, QUICKSTART
from tokenizer_kinds import KINDS

from mtl_lora.language.config import EvalConfig
from mtl_lora.language.encode import Encoder, template
from mtl_lora.language.evaluate import run
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import COMMONSENSE

FOLDER = PROJECT / "docs" / "lm_eval"
NAMES = ["boolq", "piqa", "ARC-Challenge", "openbookqa"]
LIMIT, CUTOFF = 6, 300


@pytest.fixture(scope="module")
def tasks_module():
    specification = importlib.util.spec_from_file_location("mtl_lora_tasks", FOLDER / "mtl_lora_tasks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cutoff_len", [105, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_text_given_to_the_harness_has_the_tokens_of_our_prompts_and_answers(
    tasks_module, tmp_path, capsys, kind, cutoff_len
):
    tokenizer = KINDS[kind](tmp_path)
    tokenizer.save_pretrained(tmp_path)
    documents = tasks_module.load(
        "piqa", pretrained=str(tmp_path), data_dir=str(QUICKSTART / "test"), cutoff_len=cutoff_len, dtype="float32"
    )["test"]
    examples = load_examples(QUICKSTART / "test" / "piqa" / "test.json", COMMONSENSE, "piqa", closed=True)
    encoder = Encoder(tokenizer, "alpaca", cutoff_len, COMMONSENSE)
    encoded = encoder.encode(examples, with_answers=False)
    options, other = ["solution1", "solution2"], []
    for document, example, prompt in zip(documents, examples, encoded, strict=True):
        assert document["index"] == example.index
        assert options[document["gold"]] == example.answer
        assert document["choices"] == [f" {option}{tokenizer.eos_token}" for option in options]
        if not prompt.removed:
            assert document["context"].startswith(template("alpaca").prompt(example.text()))
        read = [tokenizer.encode(document["context"] + choice) for choice in document["choices"]]
        if read != [prompt.prompt_ids + encoder.answer_ids(f"the correct answer is {option}") for option in options]:
            other.append(prompt)
    # tokens may merge where the middle was taken out; nothing else differs, and what differs is said
    assert all(prompt.removed for prompt in other) and len(other) < 4
    assert any(prompt.removed for prompt in encoded) == (cutoff_len == 105)
    message = capsys.readouterr().err
    assert f"reads {len(other)} of {len(examples)} questions by other" in message if other else message == ""


def test_questions_that_are_read_by_other_tokens_are_counted(tasks_module, tmp_path, capsys):
    KINDS["gpt2"](tmp_path).save_pretrained(tmp_path)
    flags = {"pretrained": str(tmp_path), "data_dir": str(QUICKSTART / "test"), "cutoff_len": 2048}
    # this template ends in spaces, the last of which merges with the answer's first word in one text
    tasks_module.load("piqa", template="original", **flags)
    total = len(json.loads((QUICKSTART / "test" / "piqa" / "test.json").read_text()))
    assert f"piqa: the harness reads {total} of {total} questions by other tokens" in capsys.readouterr().err


def test_harness_file_is_there_for_every_task():
    for task in COMMONSENSE:
        lines = (FOLDER / f"{task.name}.yaml").read_text().splitlines()
        assert f"task: mtl_lora_{task.name}" in lines and f"  mtl_lora_task: {task.name}" in lines
        assert f"  - mtl_lora_{task.name}" in (FOLDER / "mtl_lora.yaml").read_text().splitlines()


def ours(base: str, folder) -> dict[tuple[str, int], dict]:
    """The prediction records of an evaluation by score."""
    run(
        EvalConfig(
            base_model=base,
            data_dir=str(QUICKSTART / "test"),
            output_dir=str(folder),
            tasks=NAMES,
            limit=LIMIT,
            mode="score",
            dtype="fp32",
            cutoff_len=CUTOFF,
        )
    )
    lines = [line for path in (folder / "predictions").glob("*.jsonl") for line in path.read_text().splitlines()]
    return {(record["task"], record["index"]): record for record in map(json.loads, lines)}


def probabilities(scores: list[float]) -> list[float]:
    """Log-probabilities among the options alone: what they all share falls out."""
    total = math.log(sum(math.exp(score - max(scores)) for score in scores)) + max(scores)
    return [score - total for score in scores]


def test_harness_gives_the_scores_and_answers_of_our_own_evaluation(tiny_base, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install lm-eval==0.4.13 to run this")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    expected = ours(tiny_base, tmp_path / "ours")
    metadata = {"pretrained": tiny_base, "data_dir": str(QUICKSTART / "test"), "cutoff_len": CUTOFF}
    found = simple_evaluate(
        model=HFLM(pretrained=tiny_base, device="cpu", dtype="float32", batch_size=4),
        tasks=[f"mtl_lora_{name}" for name in NAMES],
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata),
        limit=LIMIT,
        bootstrap_iters=0,
    )
    assert len(expected) == LIMIT * len(NAMES)
    assert "by other tokens" not in capsys.readouterr().err
    for name in NAMES:
        samples = found["samples"][f"mtl_lora_{name}"]
        assert len(samples) == LIMIT
        for sample in samples:
            record = expected[name, sample["doc"]["index"]]
            scores = [float(score) for score, _ in sample["filtered_resps"]]
            assert probabilities(scores) == pytest.approx(probabilities(record["scores"]), abs=1e-3)
            assert sample["acc"] == record["correct"]
        share = sum(record["correct"] for (task, _), record in expected.items() if task == name) / LIMIT
        assert found["results"][f"mtl_lora_{name}"]["acc,none"] == pytest.approx(share)
