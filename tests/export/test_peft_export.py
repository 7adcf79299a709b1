"""An exported folder is a plain PEFT LoRA that computes what the routed model computes; its card says what it is."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from export_cases import (
    SCALES,
    TARGETS,
    TOLERANCE,
    load_base,
    logits,
    peft_difference,
    relative_difference,
    routed_logits,
    save_adapter,
)
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from reference.tiny import FACTORED, TASKS, adapted_llama
from safetensors.torch import load_file

import mtl_lora
from mtl_lora import Origin
from mtl_lora.adapter.checkpoint import CONFIG_NAME, WEIGHTS_NAME, read_config
from mtl_lora.base_model import BaseModel
from mtl_lora.export.__main__ import main
from mtl_lora.export.peft_format import export_peft

FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """The export of a method on an architecture; made once."""
    made = {}

    def get(kind: str, label: str):
        if (kind, label) not in made:
            made[kind, label] = tmp_path_factory.mktemp("exports") / f"{kind}_{label}"
            export_peft(checkpoints(kind, label), made[kind, label])
        return made[kind, label]

    return get


def settings(folder) -> dict:
    """The configuration of an exported task."""
    return json.loads((folder / "adapter_config.json").read_text())


# ---- what it computes ----


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("label", FACTORED)
@pytest.mark.parametrize("kind", TARGETS)
def test_peft_computes_what_the_routed_model_computes(bases, checkpoints, exported, kind, label, task):
    checkpoint, folder = checkpoints(kind, label), exported(kind, label) / task
    assert peft_difference(bases[kind], checkpoint, folder, task) < TOLERANCE
    # The comparison could fail: the adapter changes a lot.
    assert relative_difference(logits(load_base(bases[kind])), routed_logits(bases[kind], checkpoint, task)) > 0.1


@pytest.mark.parametrize("label", ["moelora", "mtl_lora", "mtl_lora_diagonal"])
def test_folder_of_another_task_computes_something_else(bases, checkpoints, exported, label):
    folder = exported("llama", label) / TASKS[1]
    assert peft_difference(bases["llama"], checkpoints("llama", label), folder, TASKS[0]) > 100 * TOLERANCE


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("label", ["lora", "dora", "multilora", "mtl_lora"])
def test_scale_that_no_whole_alpha_gives_is_kept(bases, tmp_path, label, scale):
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", label, **scale)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", [TASKS[2]])
    assert type(settings(folder)["lora_alpha"]) is int
    assert peft_difference(bases["llama"], checkpoint, folder, TASKS[2]) < TOLERANCE


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("llama", ["layers.1.self_attn.q_proj"]),
        ("llama", r"model\.layers\.0\..*_proj"),
        ("llama", "all-linear"),
        ("llama", ["lm_head"]),
        ("gpt2", ["attn.c_proj"]),  # an ending that the MLP has too
        ("gpt2", ["c_attn", "lm_head"]),  # Conv1D and nn.Linear, and a head tied to the embedding
    ],
    ids=str,
)
def test_peft_adapts_exactly_the_same_modules(bases, tmp_path, kind, targets):
    checkpoint = save_adapter(bases[kind], tmp_path / "checkpoint", "mtl_lora", target_modules=targets)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", [TASKS[1]])
    model = PeftModel.from_pretrained(load_base(bases[kind]), folder).base_model.model
    ours = mtl_lora.adapter_layers(mtl_lora.load(load_base(bases[kind]), checkpoint))
    assert [name for name, module in model.named_modules() if isinstance(module, LoraLayer)] == list(ours)
    assert peft_difference(bases[kind], checkpoint, folder, TASKS[1]) < TOLERANCE


@pytest.mark.parametrize("kind, expected", [("llama", TARGETS["llama"]), ("gpt2", TARGETS["gpt2"])])
def test_targets_are_short_names_where_these_mean_the_same(exported, kind, expected):
    assert sorted(settings(exported(kind, "mtl_lora") / TASKS[0])["target_modules"]) == sorted(expected)


def test_configuration_is_a_plain_lora_of_the_right_rank(bases, exported):
    ranks = {"lora": 3, "dora": 3, "multilora": 9, "moelora": 6, "mtl_lora": 3, "mtl_lora_diagonal": 3}
    for label, rank in ranks.items():
        config = settings(exported("gpt2", label) / TASKS[0])
        assert (config["r"], config["use_dora"]) == (rank, label == "dora")
        assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
        assert config["fan_in_fan_out"] is True
        assert config["base_model_name_or_path"] == bases["gpt2"]
        assert (config["inference_mode"], config["lora_dropout"]) == (True, 0.0)


def test_weights_are_the_factors_bit_for_bit_in_float32(bases, checkpoints, exported):
    model = mtl_lora.load(load_base(bases["llama"]), checkpoints("llama", "mtl_lora"))
    tensors = load_file(exported("llama", "mtl_lora") / "birds" / "adapter_model.safetensors")
    expected = {}
    for name, layer in mtl_lora.adapter_layers(model).items():
        A, B, _ = layer.factors("birds")
        expected |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# ---- what it needs ----


def test_weights_of_the_base_are_not_needed(bases, tmp_path):
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "dora")
    (base / "model.safetensors").unlink()
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"])
    shutil.copytree(bases["gpt2"], base, dirs_exist_ok=True)
    assert settings(folder)["fan_in_fan_out"] is True
    assert peft_difference(str(base), checkpoint, folder, "maps") < TOLERANCE


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("label", FACTORED)
def test_base_that_can_not_be_had_is_noted_and_the_checkpoint_is_enough(bases, tmp_path, capsys, kind, label):
    base = shutil.copytree(bases[kind], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", label)
    shutil.rmtree(base)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"])
    assert "note: layer names are not compared with the base model's" in capsys.readouterr().err
    shutil.copytree(bases[kind], base)
    assert peft_difference(str(base), checkpoint, folder, "maps") < TOLERANCE


def test_layers_are_named_whole_where_nobody_knows_the_others(bases, tmp_path):
    base = shutil.copytree(bases["gpt2"], tmp_path / "base")
    checkpoint = save_adapter(str(base), tmp_path / "checkpoint", "lora", target_modules=["h.1.attn.c_proj"])
    shutil.rmtree(base)
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"])
    assert settings(folder)["target_modules"] == ["transformer.h.1.attn.c_proj"]


def test_float64_adapter_is_exported(bases, tmp_path):
    mtl_lora.save(adapted_llama("mtl_lora", torch.float64), tmp_path / "checkpoint", Origin(bases["llama"]))
    (folder,) = export_peft(tmp_path / "checkpoint", tmp_path / "peft", ["maps"])
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float64}


def test_adapter_without_tasks_is_one_folder(bases, tmp_path):
    checkpoint = save_adapter(bases["llama"], tmp_path / "checkpoint", "dora", tasks=[])
    assert export_peft(checkpoint, tmp_path / "peft") == [tmp_path / "peft" / "all"]
    model = mtl_lora.load(load_base(bases["llama"]), checkpoint).eval()
    plain = PeftModel.from_pretrained(load_base(bases["llama"]), tmp_path / "peft" / "all").eval()
    assert relative_difference(logits(plain), logits(model)) < TOLERANCE


# ---- the card ----


def write_results(path, checkpoint, **changes):
    """The part of an evaluation's results that a card reads."""
    tasks = {"maps": {"accuracy": 0.625, "stderr": 0.0625, "n": 60}}
    adapter = {"weights_sha256": read_config(checkpoint).weights_sha256}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "mode": "score", "tasks": tasks, "adapter": adapter, **changes}))


def card(folder) -> str:
    return (folder / "README.md").read_text()


def test_card_tells_score_recipe_prompt_and_use(checkpoint, tmp_path):
    write_results(checkpoint / "evaluation" / "results.json", checkpoint)
    maps, birds = export_peft(checkpoint, tmp_path / "peft", ["maps", "birds"])
    assert "Accuracy on maps: 62.5 % ± 6.2 of 60 questions, protocol `score`." in card(maps)
    assert "Accuracy on birds: not measured." in card(birds)
    for row in (
        "method | mtl_lora",
        "rank | 3",
        "alpha | 6",
        "temperature | 0.5",
        "tasks | tides, maps, birds, rivers",
    ):
        assert f"| {row} |" in card(maps)
    assert "arxiv.org/abs/2410.09437" in card(maps)
    assert repr("### Instruction:\n{instruction}\n\n### Response:\n")[1:-1] in card(maps)
    assert "PeftModel.from_pretrained" in card(maps)


def test_card_without_an_evaluation_says_not_measured(exported):
    assert "Accuracy on maps: not measured." in card(exported("llama", "lora") / "maps")


def test_scores_of_other_weights_are_not_put_on_the_card(checkpoint, tmp_path):
    write_results(checkpoint / "evaluation" / "results.json", checkpoint, adapter={"weights_sha256": "0" * 64})
    (folder,) = export_peft(checkpoint, tmp_path / "peft", ["maps"])
    assert "Accuracy on maps: not measured." in card(folder)


def test_results_that_are_named_are_read_from_file_or_folder(checkpoint, tmp_path):
    write_results(tmp_path / "elsewhere" / "results.json", checkpoint)
    for number, path in enumerate([tmp_path / "elsewhere", tmp_path / "elsewhere" / "results.json"]):
        (folder,) = export_peft(checkpoint, tmp_path / f"peft{number}", ["maps"], results=path)
        assert "62.5 %" in card(folder)


# ---- the command ----


def test_command_writes_one_folder_a_task_and_names_them(command, bases, checkpoints, tmp_path):
    printed = command("peft", checkpoint=checkpoints("llama", "lora"), output=tmp_path / "new" / "peft")
    assert printed == [str(tmp_path / "new" / "peft" / task) for task in TASKS]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"peft"}
    for folder in (tmp_path / "new" / "peft").iterdir():
        assert {path.name for path in folder.iterdir()} == FILES


def test_command_takes_a_choice_of_tasks_and_another_name_for_the_base(command, bases, checkpoints, tmp_path):
    base = shutil.copytree(bases["llama"], tmp_path / "moved")
    printed = command(
        "peft",
        checkpoint=checkpoints("llama", "mtl_lora"),
        output=tmp_path / "peft",
        tasks="rivers, tides",
        base_model=base,
    )
    assert printed == [str(tmp_path / "peft" / task) for task in ("rivers", "tides")]
    assert settings(tmp_path / "peft" / "tides")["base_model_name_or_path"] == str(base)


def test_module_runs_from_the_command_line(checkpoints, tmp_path):
    arguments = ["peft", "--checkpoint", checkpoints("llama", "lora"), "--output", tmp_path / "peft", "--tasks", "no"]
    command = [sys.executable, "-m", "mtl_lora.export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: there is no task 'no'; the adapter's tasks are tides, maps, birds, rivers\n"


# ---- refusals ----


def flip_a_bit(checkpoint, edit_json):
    path = checkpoint / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_off_the_end(checkpoint, edit_json):
    path = checkpoint / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-4])


def forget_the_base(checkpoint, edit_json):
    edit_json(checkpoint / CONFIG_NAME, origin={})


def name_a_task_like_a_path(checkpoint, edit_json):
    adapter = json.loads((checkpoint / CONFIG_NAME).read_text())["adapter"]
    edit_json(checkpoint / CONFIG_NAME, adapter={**adapter, "tasks": ["a/../b", "maps", "birds", "rivers"]})


def be_of_another_base(checkpoint, edit_json):
    origin = json.loads((checkpoint / CONFIG_NAME).read_text())["origin"]
    edit_json(checkpoint / CONFIG_NAME, origin={**origin, "base_fingerprint": "0" * 64})


def have_results_without_scores(checkpoint, edit_json):
    write_results(checkpoint / "evaluation" / "results.json", checkpoint, tasks={"maps": 0.5})


def be_no_checkpoint(checkpoint, edit_json):
    (checkpoint / CONFIG_NAME).unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (flip_a_bit, "mtl_lora.safetensors is damaged"),
        (cut_off_the_end, "mtl_lora.safetensors is damaged"),
        (forget_the_base, "does not say its base model; pass --base_model"),
        (name_a_task_like_a_path, "the task 'a/../b' cannot name a folder"),
        (be_of_another_base, "was trained on another base model than"),
        (have_results_without_scores, "results.json holds no scores"),
        (be_no_checkpoint, "is no MTL-LoRA checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_checkpoint_that_can_not_be_exported_is_one_sentence(refused, checkpoint, tmp_path, edit_json, spoil, message):
    spoil(checkpoint, edit_json)
    assert message in refused("peft", checkpoint=checkpoint, output=tmp_path / "peft")


def test_checkpoint_that_does_not_fit_the_base_names_what_is_wrong(refused, bases, checkpoint, tmp_path, edit_json):
    edit_json(checkpoint / CONFIG_NAME, origin={"base_model": bases["gpt2"]})
    sentence = refused("peft", checkpoint=checkpoint, output=tmp_path / "peft")
    assert "no linear layer is named 'q_proj'; this model has c_attn (2)" in sentence


def test_checkpoint_of_other_sizes_than_the_base_names_the_weight(refused, bases, checkpoint, tmp_path, edit_json):
    base = shutil.copytree(bases["llama"], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    edit_json(base / "config.json", intermediate_size=32)
    sentence = refused("peft", checkpoint=checkpoint, output=tmp_path / "peft", base_model=base)
    assert "mlp.down_proj.lora_A has shape [3, 24], not [3, 32]" in sentence


def test_unknown_task_names_the_tasks_there_are(refused, checkpoint, tmp_path):
    sentence = refused("peft", checkpoint=checkpoint, output=tmp_path / "peft", tasks="maps,oceans")
    assert sentence == "there is no task 'oceans'; the adapter's tasks are tides, maps, birds, rivers"


def test_named_results_of_other_weights_are_refused(refused, checkpoint, tmp_path):
    write_results(tmp_path / "results.json", checkpoint, adapter=None)
    sentence = refused("peft", checkpoint=checkpoint, output=tmp_path / "peft", results=tmp_path / "results.json")
    assert "results.json is not of this checkpoint's weights; evaluate" in sentence


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["peft", "--output", "x"], "--checkpoint"),
        (["peft", "--output", "x", "--checkpoint", "y", "--taks", "maps"], "--taks"),
        (["pfet"], "invalid choice: 'pfet'"),
        ([], "COMMAND"),
    ],
    ids=str,
)
def test_wrong_flags_are_one_sentence(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- in lm-evaluation-harness ----


def test_lm_evaluation_harness_loads_an_exported_folder(bases, trained, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed; pip install lm-eval==0.4.13 to run this")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    (folder,) = export_peft(trained, tmp_path / "peft", ["piqa"])
    base = settings(folder)["base_model_name_or_path"]
    pairs = [("A lamp gives", " light"), ("Soup is best", " hot")]

    def scores(**options) -> list[float]:
        model = HFLM(pretrained=base, device="cpu", dtype="float32", batch_size=2, **options)
        requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        return [score for score, _ in model.loglikelihood(requests)]

    model, tokenizer = mtl_lora.load(BaseModel(base).load("fp32"), trained).eval(), BaseModel(base).tokenizer()
    expected = []
    for context, answer in pairs:
        ids, tail = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad(), mtl_lora.route.use(torch.tensor([1])):
            steps = model(input_ids=torch.tensor([ids + tail])).logits[0].log_softmax(dim=-1)
        expected.append(sum(steps[len(ids) + i - 1, token].item() for i, token in enumerate(tail)))
    assert scores(peft=str(folder)) == pytest.approx(expected, rel=1e-4)
    assert scores() != pytest.approx(expected, rel=1e-2)
