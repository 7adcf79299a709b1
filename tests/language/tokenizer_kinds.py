"""Four small tokenizers, trained here, that stand for the families a base model may bring.

They differ in what matters to encoding: whether BOS is added, which special tokens exist, how white space and
punctuation are cut into tokens, and whether there is a pad token.
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

# Text to learn merges from. It holds what prompts are made of, line ends after punctuation and long runs of spaces
# included, so that tokens which would merge across a boundary exist.
SPACES = " " * 16
TEXT = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context.\n\n",
    f"the request.  \n\n{SPACES}### Instruction:\n{SPACES}Name a bird that sings.\n{SPACES}\n{SPACES}### Input:",
    f"{SPACES}### Response:\n{SPACES}the correct answer is solution1\n{SPACES}the correct answer is option2",
    "### Instruction:\nPlease answer the question with true or false.\n\n### Response:\nthe correct answer is ",
    "Please choose the correct ending to complete the given sentence: the miller closed the gate, then",
    "Please choose the correct answer to fill in the blank: the jar was heavier than the cup because _ was full.",
    "Answer1: a lantern Answer2: a ladder Answer3: a loaf of bread Answer4: a letter Answer5: a lake\n\n",
    "Answer format: answer1/answer2/answer3/answer4/answer5\n\nAnswer format: ending1/ending2/ending3/ending4",
    "Solution1: dry the boots by the stove\n\nSolution2: put the boots in the pond\n\nAnswer format: true/false",
    "In spring the river carries sand to the harbour; in autumn it carries leaves, and nobody counts either.",
    "A short word is a good word! Is it? It is: see, run, eat, sleep; one, two, three ... 10, 20, 365 days.",
]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _load(folder: Path, settings: dict) -> PreTrainedTokenizerBase:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(str(folder))


def llama2(folder: Path, **settings) -> PreTrainedTokenizerBase:
    """sentencepiece BPE with byte fallback, BOS added, no pad token (LLaMA, LLaMA-2)."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXT for line in text.split("\n") if line),
        model_writer=written,
        model_type="bpe",
        vocab_size=600,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}
    return _load(folder, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **special, **settings})


def _byte_level(pre_tokenizer, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def llama3(folder: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE that keeps line ends with punctuation, BOS added by a template, no pad token (LLaMA-3)."""
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = _byte_level(pre_tokenizers.Sequence([split, byte_level]), [bos, eos])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return _load(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos})


def gpt2(folder: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE that adds nothing; one special token for everything, no pad token (GPT-2)."""
    _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"]).model.save(str(folder))
    return _load(folder, {"tokenizer_class": "GPT2Tokenizer"})


def own_pad(folder: Path) -> PreTrainedTokenizerBase:
    """Byte-level BPE that adds nothing and has a BOS, an EOS and a pad token of its own (Qwen, SmolLM2)."""
    special = {"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    return _load(folder, {"tokenizer_class": "PreTrainedTokenizerFast", **special})


KINDS: dict[str, Callable[[Path], PreTrainedTokenizerBase]] = {
    "llama2": llama2,
    "llama3": llama3,
    "gpt2": gpt2,
    "own_pad": own_pad,
}
ADDS_BOS = {"llama2", "llama3"}
