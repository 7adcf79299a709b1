"""The embedded base models: what they are, what is refused in their place, and answers that are alike in any batch."""

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch
from shared import QUICKSTART
from tokenizers import Tokenizer
from transformers import BertModel

import mtl_lora
from mtl_lora import embedded
from mtl_lora.adapter import checkpoint
from mtl_lora.base_model import BaseModel
from mtl_lora.embedded import MODELS
from mtl_lora.evaluation import load_questions
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.evaluate import Evaluator
from mtl_lora.language.examples import load_examples
from mtl_lora.language.tasks import COMMONSENSE

SMOLLM2, MINILM, DINOV2 = "smollm2-135m", "minilm-l6", "dinov2-small"
# The fingerprint of the converted model: the conversion of the pinned file gives these tensors and no others.
FINGERPRINT = "a9619c4c73874e3d87eabc476e8357d5f218431ed125b161bfac116d89fc5984"
DINOV2_FINGERPRINT = "ab1f1e8749c988658bb6a69bd704c238b485baf2cc74a5162c093aba7dbbef6d"


@pytest.mark.slow
def test_the_converted_model_is_the_pinned_one_and_speaks():
    base = BaseModel(SMOLLM2)
    assert base.fingerprint() == FINGERPRINT
    model, tokenizer = base.load("fp32"), base.tokenizer()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert tokenizer.eos_token == "<|im_end|>"  # noqa: S105 - a token of text


SENTENCES = ["A man is playing a guitar.", "Someone plays an instrument.", "The Élysée's budget didn't pass in 1998."]


@pytest.mark.slow
def test_the_embedded_encoder_is_the_wheels_files_and_places_paraphrases_together():
    base = BaseModel(MINILM, kind="encoder")
    tokenizer, model = base.tokenizer(), base.load("fp32", num_labels=3).eval()
    inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    own = Tokenizer.from_file(f"{base.path}/tokenizer.json")
    own.no_padding()
    assert [
        ids[: sum(mask)].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ] == [own.encode(sentence).ids for sentence in SENTENCES]
    plain = BertModel.from_pretrained(base.path).eval()
    with torch.no_grad():
        hidden, pooled = plain(**inputs)[:2]
        assert torch.equal(model(**inputs).logits, model.classifier(pooled))
    mask = inputs["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    # Measured once with the wheel's files loaded by transformers alone.
    assert (means[0] @ means[1]).item() == pytest.approx(0.667, abs=2e-3)
    assert (means[0] @ means[2]).item() == pytest.approx(-0.107, abs=2e-3)


@pytest.mark.slow(8)
def test_the_embedded_vision_model_gives_what_onnxruntime_computes_of_the_wheels_file(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    try:
        base = BaseModel(DINOV2, kind="vision")
        model = base.load("fp32").eval()
        embedded.take_members(DINOV2, embedded.fetch_wheel(DINOV2, tmp_path), tmp_path)
    except mtl_lora.UserError as error:
        pytest.skip(str(error))
    assert base.fingerprint() == DINOV2_FINGERPRINT
    output = b"/backbone/layernorm/Add_1_output_0"
    # The model's end is a decoder. Protobuf merges what is appended: one more output, field 12 of the graph, field 7.
    asked = b"\x0a" + bytes([len(output)]) + output
    asked = b"\x62" + bytes([len(asked)]) + asked
    content = (tmp_path / "vit_s_focus.onnx").read_bytes() + b"\x3a" + bytes([len(asked)]) + asked
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = onnxruntime.InferenceSession(content).run([output.decode()], {"input_image": images.numpy()})[0]
    with torch.no_grad():
        hidden = model(pixel_values=images).last_hidden_state
    assert hidden.shape == (2, 1 + 16 * 16, 384)
    # The largest difference was 1.5e-5, of values up to 8.5.
    assert torch.allclose(hidden, torch.from_numpy(expected), rtol=0, atol=1e-4)


def wheel(folder: Path, model: str, content: bytes) -> None:
    """A wheel that pip takes, with other bytes in the place of each file that is used."""
    name, version = MODELS[model].wheel.replace("-", "_").split("==")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        information = f"{name}-{version}.dist-info/"
        for member in MODELS[model].members:
            made.writestr(member, content)
        made.writestr(information + "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        made.writestr(information + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(information + "RECORD", "")


@pytest.fixture
def wheels(monkeypatch, tmp_path) -> Path:
    """The folder where pip looks, and nowhere else."""
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MTL_LORA_WHEELS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


@pytest.mark.parametrize(("made", "message"), [(True, "other bytes"), (False, "cannot be fetched with pip")])
@pytest.mark.slow
def test_other_bytes_and_a_missing_wheel_are_refused_and_leave_nothing_behind(wheels, made, message, monkeypatch):
    (wheels / "pip.py").write_text("raise SystemExit('a module of the current folder was run')")
    monkeypatch.chdir(wheels)
    if made:
        wheel(wheels, SMOLLM2, b"no model")
    with pytest.raises(mtl_lora.UserError, match=message):
        embedded.model_folder(SMOLLM2)
    assert [path.name for path in embedded.cache_folder().iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("model", MODELS)
def test_wheel_that_was_carried_is_taken_without_network_and_checked_too(monkeypatch, wheels, model):
    monkeypatch.setenv("MTL_LORA_WHEELS", str(wheels))
    monkeypatch.setattr(embedded.subprocess, "run", lambda *arguments, **options: pytest.fail("pip was started"))
    for other in MODELS.keys() - {model}:
        wheel(wheels, other, b"no model")
    with pytest.raises(mtl_lora.UserError, match=f"holds no wheel of {MODELS[model].wheel}"):
        embedded.model_folder(model)
    wheel(wheels, model, b"no model")
    with pytest.raises(mtl_lora.UserError, match=f"{MODELS[model].wheel} has other bytes"):
        embedded.model_folder(model)
    for path in wheels.glob(MODELS[model].wheel_pattern):
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(mtl_lora.UserError, match=f"{MODELS[model].wheel} has other bytes"):
        embedded.model_folder(model)


@pytest.mark.slow(1)
def test_files_of_a_wheel_that_are_transformers_own_are_kept_as_they_are(monkeypatch, wheels):
    content = b"exact bytes"
    members = dict.fromkeys(("a/config.json", "a/model.safetensors"), hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(MODELS, MINILM, dataclasses.replace(MODELS[MINILM], members=members))
    wheel(wheels, MINILM, content)
    folder = embedded.model_folder(MINILM)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "config.json": content,
        "model.safetensors": content,
    }
    for path in wheels.iterdir():
        path.unlink()
    assert embedded.model_folder(MINILM) == folder == embedded.cache_folder() / MINILM


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory) -> Evaluator:
    """An adapter whose every weight matters, on the embedded model: B is noise instead of zero."""
    folder, base = tmp_path_factory.mktemp("noisy"), BaseModel(SMOLLM2)
    torch.manual_seed(0)
    model = mtl_lora.inject(base.load("fp32"), mtl_lora.AdapterConfig(tasks=COMMONSENSE.names))
    for layer in mtl_lora.adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    origin = checkpoint.Origin(SMOLLM2, base.fingerprint(), "alpaca", 256, COMMONSENSE.to_json())
    mtl_lora.save(model, folder, origin)
    del model
    questions = {"data_dir": str(QUICKSTART / "test"), "limit": 1}
    made = Evaluator(EvalConfig(checkpoint=str(folder), dtype="fp32", max_new_tokens=4, **questions))
    made.load()
    return made


@pytest.mark.slow(15)
@pytest.mark.parametrize("mode", ["generate", "score"])
def test_questions_of_all_tasks_get_the_same_answers_alone_and_in_batches(evaluator, mode):
    asked = load_questions(evaluator, load_examples).questions
    evaluator.prepare({mode: asked})
    by_size = []
    for size in (1, 16):
        evaluator.config.batch_size = size
        lines = [line for batch in evaluator.batches(asked, mode) for line in evaluator.answer(batch, mode)]
        by_size.append({(line["task"], line["index"]): line.get("text", line["parsed"]) for line in lines})
    assert len(by_size[0]) == 8 and by_size[0] == by_size[1]
    assert len(set(by_size[0].values())) > 3, "a model that always says the same would pass any comparison"
