"""What an encoder's checkpoint becomes: plain models and PEFT LoRAs of one task, equal to its own outputs."""

import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from reference.tiny import adapter_config, randomise, tokens
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import mtl_lora
from mtl_lora import Provenance, UserError
from mtl_lora.artifacts import CHECKPOINT_CONFIG
from mtl_lora.base_model import BaseModel
from mtl_lora.export.merge import export_merged
from mtl_lora.export.peft import export_peft
from mtl_lora.nlu import model as encoder
from mtl_lora.nlu.tasks import Task, TaskSet

THREE = TaskSet(
    (
        Task("tone.x", 0, labels=("sad", "glad"), metric="matthews"),
        Task("rank", 1, regression=(1.0, 5.0), weight=3),
        Task("place", 2, labels=("sea", "hill", "town")),
    )
)
SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
    "dim": 16,
    "hidden_dim": 24,
    "n_layers": 2,
    "n_heads": 2,  # DistilBERT's words
}
CLASSES = {
    "bert": (BertForSequenceClassification, BertConfig),
    "roberta": (RobertaForSequenceClassification, RobertaConfig),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig),
    "llama": (LlamaForSequenceClassification, LlamaConfig),
}


@pytest.fixture(scope="module")
def encoders(tiny_base, tmp_path_factory):
    """A checkpoint of a method on a tiny encoder: ``encoders("bert", "mtl_lora")`` returns its folder."""
    made, root = {}, tmp_path_factory.mktemp("encoders")

    def get(kind: str, label: str, tasks: TaskSet = THREE, **changes) -> Path:
        base = root / kind
        if not base.exists():
            torch.manual_seed(0)
            model, config = CLASSES[kind]
            whole = model(config(**SIZES, pad_token_id=0)).eval()
            # RoBERTa's files bring a head of another size, as a model does that was fine-tuned before.
            (whole if kind == "roberta" else whole.base_model).save_pretrained(base)
            for path in Path(tiny_base).glob("tokenizer*"):
                (base / path.name).write_bytes(path.read_bytes())
        key = kind, label, tasks, str(changes)
        if key not in made:
            model = load(base, tasks)
            config = adapter_config(label, tasks=tasks.names, target_modules="all-linear", **changes)
            randomise(mtl_lora.inject(model, encoder.in_encoder(config, model)), spread=0.3)
            with torch.no_grad():
                for slot in model.mtl_lora_injection.slots:
                    slot.get().add_(torch.randn(slot.get().shape) * 0.3)
            task_set, digest = tasks.to_json(), BaseModel(str(base)).fingerprint()
            made[key] = root / f"{kind}_{label}_{len(made)}"
            mtl_lora.save(
                model,
                made[key],
                Provenance(
                    str(base), digest, task_set=task_set, system="nlu", cutoff_len=32, untrained_tasks=["place"]
                ),
            )
        return made[key]

    return get


def load(base: Path, tasks: TaskSet = THREE, dtype: str = "fp32"):
    torch.manual_seed(1)
    return encoder.load(BaseModel(str(base), kind="encoder"), tasks, dtype).eval()


@torch.no_grad()
def own_outputs(checkpoint: Path, task: Task, dtype: str) -> torch.Tensor:
    """What evaluation reads: of a regression the number of its range."""
    model = mtl_lora.load(checkpoint, dtype=dtype).eval()
    logits = model(input_ids=tokens(3), task_ids=[task.name] * 3).logits[:, : task.outputs]
    return task.unscaled(logits) if task.is_regression else logits


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model.eval()(input_ids=tokens(3)).logits


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("fp64", 1e-10)])
@pytest.mark.parametrize("kind, label", [("bert", "mtl_lora"), ("roberta", "mtl_lora"), ("bert", "none")])
@pytest.mark.slow
def test_merged_model_has_the_head_of_its_task(command, encoders, tmp_path, kind, label, dtype, tolerance):
    checkpoint = encoders(kind, label)
    for task in THREE:
        folder = tmp_path / task.name
        command("merge", checkpoint=checkpoint, task=task.name, output=folder, dtype=dtype)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(model) is CLASSES[kind][0]
        assert_equal(outputs(model), own_outputs(checkpoint, task, dtype), tolerance)
        config = model.config
        assert config.num_labels == task.outputs
        kind_of_problem = "regression" if task.is_regression else "single_label_classification"
        assert config.problem_type == kind_of_problem
        if task.labels:
            assert tuple(config.id2label.values()) == task.labels and config.label2id[task.labels[1]] == 1
        assert (folder / "tokenizer.json").is_file()
        assert "library_name: transformers" in (folder / "README.md").read_text()
    with pytest.raises(SystemExit):  # each task has a head of its own
        command("merge", checkpoint=checkpoint, output=tmp_path / "none")


@pytest.mark.parametrize(
    "kind, label, words",
    [
        ("bert", "mtl_lora", ()),
        ("distilbert", "moelora", ()),
        ("roberta", "mtl_lora", ()),
        ("roberta", "dora", ()),
        ("bert", "dora", ("--as", "lora", "--rank", "16")),
    ],
    ids=str,
)
@pytest.mark.slow
def test_card_of_a_peft_folder_loads_what_the_checkpoint_computes(command, encoders, tmp_path, kind, label, words):
    checkpoint = encoders(kind, label)
    base = Path(json.loads((checkpoint / CHECKPOINT_CONFIG).read_text())["provenance"]["base_model"])
    folders = command("peft", *words, checkpoint=checkpoint, output=tmp_path / "peft")
    for task, folder in zip(THREE, map(Path, folders), strict=True):
        assert folder.name == task.name
        settings = json.loads((folder / "adapter_config.json").read_text())
        head = ["pre_classifier", "classifier"] if kind == "distilbert" else ["classifier"]
        assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", head)
        card = (folder / "README.md").read_text()
        code = re.search("```python\n(.*?)```", card, re.DOTALL)[1].replace("this folder", str(folder))
        told = {}
        exec(code.replace("the folder of its base model", str(base)), told)  # noqa: S102 - as a reader copies it
        assert_equal(outputs(told["model"]), own_outputs(checkpoint, task, "fp32"), 1e-5)
        config = told["model"].config
        assert config.num_labels == task.outputs
        if task.is_regression:
            assert config.problem_type == "regression"
        else:
            assert config.id2label == dict(enumerate(task.labels))
            assert config.label2id == {label: index for index, label in enumerate(task.labels)}


@pytest.mark.slow(1)
def test_card_says_what_the_outputs_mean(command, encoders, tmp_path, capsys):
    tone, rank, place = command("peft", checkpoint=encoders("bert", "mtl_lora"), output=tmp_path / "peft")
    card = (Path(tone) / "README.md").read_text()
    for fact in (
        "pipeline_tag: text-classification",
        "`'sad'`, `'glad'`",
        "Matthews",
        "| cutoff_len | 32 |",
        "| loss weights | rank 3 |",
    ):
        assert fact in card
    assert f"transformers {transformers.__version__}" in card and mtl_lora.__version__ in card
    assert "from 1 to 5" in (Path(rank) / "README.md").read_text()
    told = ["no training examples of this task" in (Path(each) / "README.md").read_text() for each in (rank, place)]
    assert told == [False, True]
    for write, names in ((export_merged, "place"), (export_peft, ["place"])):
        for overwrite in (False, True):
            write(encoders("bert", "mtl_lora"), tmp_path / write.__name__, names, overwrite=overwrite)
        assert capsys.readouterr().err.count("no training examples of place") == 2


def test_card_names_the_token_that_pads_batches_where_the_base_has_another(command, encoders, edit_json, tmp_path):
    checkpoint = encoders("llama", "lora", TaskSet((Task("tone", 0, labels=("sad", "glad")),)))
    base = shutil.copytree(checkpoint.parent / "llama", tmp_path / "base")
    padding = BaseModel(str(base), kind="encoder").tokenizer().pad_token_id
    for own, named in ((padding, False), (None, True), (padding + 1, True)):  # a decoder's head reads the last token
        edit_json(base / "config.json", pad_token_id=own)
        (folder,) = command("peft", "--overwrite", checkpoint=checkpoint, base_model=base, output=tmp_path / "peft")
        assert (f"pad_token_id = {padding}\n" in (Path(folder) / "README.md").read_text()) == named


@pytest.mark.slow(1)
@pytest.mark.parametrize("name", ["peft", "merge"])
def test_range_that_no_head_can_hold_is_one_sentence(command, refused, encoders, tmp_path, name):
    words = {"task": "rank"} if name == "merge" else {"tasks": "rank"}
    sentence = refused(name, checkpoint=encoders("llama", "mtl_lora"), **words)
    assert "the head of rank must end in a linear layer with one output and a bias" in sentence and "[1, 5]" in sentence
    from_zero = TaskSet((Task("rank", 0, regression=(0.0, 5.0)),))
    checkpoint = encoders("llama", "lora", from_zero)
    command("merge", checkpoint=checkpoint, task="rank", output=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert_equal(outputs(model), own_outputs(checkpoint, from_zero["rank"], "fp32"), 1e-5)


@pytest.mark.slow(1)
def test_what_encoders_cannot_become_is_one_sentence(refused, encoders, edit_json, tmp_path):
    for name, words in (("peft", {}), ("merge", {"task": "rank"})):
        assert "HydraLoRA has no factors" in refused(name, checkpoint=encoders("bert", "hydralora"), **words)
    assert "use the merge command" in refused("peft", checkpoint=encoders("bert", "none"))
    assert "pass --task, one of tone.x, rank, place" in refused("merge", checkpoint=encoders("bert", "lora"))
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')
    assert "SEQ_CLS" in refused("import-peft", peft=tmp_path / "encoder")
    lacking = encoders("bert", "lora", alpha=5)
    config = json.loads((lacking / CHECKPOINT_CONFIG).read_text())
    config["provenance"]["task_set"]["tasks"][2]["labels"].append("sky")
    edit_json(lacking / CHECKPOINT_CONFIG, provenance=config["provenance"])
    assert "classifier.2.weight" in refused("peft", checkpoint=lacking)
    assert "classifier.2.bias" in refused("merge", checkpoint=lacking, task="rank")


# ---- in Python ----


@pytest.mark.slow(1)
def test_model_with_heads_is_saved_copied_and_taken_apart(encoders, tmp_path):
    checkpoint = encoders("roberta", "mtl_lora")
    model = mtl_lora.load(checkpoint, dtype="fp32").eval()
    mixed = {"input_ids": tokens(3), "task_ids": ["place", "tone.x", "rank"]}
    with torch.no_grad():
        expected = model(**mixed).logits
        mtl_lora.save(model, tmp_path / "again")
        unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301 - written here
        for twin in (copy.deepcopy(model), unpickled, mtl_lora.load(tmp_path / "again", dtype="fp32")):
            assert torch.equal(twin.eval()(**mixed).logits, expected)
        with mtl_lora.disabled(model):
            assert not torch.equal(model(**mixed).logits, expected)
        assert torch.equal(model(**mixed).logits, expected)
        # The heads stay, so they are asked as before.
        left = mtl_lora.unload(copy.deepcopy(model))
        with mtl_lora.route.use(mixed["task_ids"]):
            assert left(input_ids=mixed["input_ids"]).logits.shape == (3, 3)
        with pytest.raises(UserError, match=r"classifier .*single_task\(model, task\)"):
            mtl_lora.merge(model, "rank")
        with pytest.raises(UserError, match="there is no task 'sky'"):
            encoder.single_task(model, "sky")
        assert torch.equal(model(**mixed).logits, expected), "a failed call left it as it was"
        plain = encoder.single_task(model, "place")
        assert_equal(plain(input_ids=tokens(3)).logits[:1], expected[:1], 1e-5)
        assert plain(input_ids=tokens(3), labels=torch.tensor([0, 1, 2])).loss > 0, "it can be trained on"


def test_hydralora_stays_as_it_was_where_it_cannot_be_merged(encoders):
    model = mtl_lora.load(encoders("bert", "hydralora"), dtype="fp32").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match="HydraLoRA has no factors"):
        encoder.single_task(model, "rank")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_adapter_of_fresh_heads_is_saved_with_its_tasks(encoders, tmp_path):
    base = encoders("bert", "lora").parent / "bert"
    model = load(base)
    mtl_lora.inject(
        model, encoder.in_encoder(adapter_config("lora", tasks=THREE.names, target_modules=["query"]), model)
    )
    mtl_lora.save(model, tmp_path / "adapter")
    again = mtl_lora.load(tmp_path / "adapter", dtype="fp32").eval()
    with torch.no_grad():
        ids = {"input_ids": tokens(1), "task_ids": ["place"]}
        assert torch.equal(again(**ids).logits, model(**ids).logits)


def test_plain_model_without_heads_is_one_sentence(encoders):
    checkpoint = encoders("bert", "mtl_lora")
    plain = BertForSequenceClassification.from_pretrained(checkpoint.parent / "bert")
    names = list(plain.state_dict())
    for model in (plain, plain.bert):
        with pytest.raises(UserError, match=r"tone.x, rank, place.*mtl_lora.load\(folder\)"):
            mtl_lora.load(model, checkpoint)
    assert list(plain.state_dict()) == names
    stretched = TaskSet((THREE[0], Task("rank", 1, regression=(0.0, 5.0)), THREE[2]))
    with pytest.raises(UserError, match=r"mtl_lora.load\(folder\)"):
        mtl_lora.load(load(checkpoint.parent / "bert", stretched), checkpoint)
