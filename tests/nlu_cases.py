"""Tiny encoders and tasks: classification of texts and of pairs, and regression."""

import random
from pathlib import Path

from shared import write_set

LABELLED = [
    {"name": "tone", "id": 0, "labels": ["sad", "glad"], "metric": "matthews"},
    {"name": "closeness", "id": 1, "regression": [1, 5], "metric": "pearson_and_spearman", "weight": 3},
    {"name": "place", "id": 2, "labels": ["sea", "hill", "town"]},
]
WORDS = [f"{first}{second}" for first in "bdfghklmn" for second in ("ab", "ek", "il", "om", "uz")]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CLS, SEP = 2, 3
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}


def make_encoder(folder: Path) -> None:
    """Write a BERT with dropout, as a configuration has it by default, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """A word is a token, what is unknown comes in pieces; [CLS] text [SEP] text_b [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL, *WORDS, *"abde", "##a", "##b"]
    wordpiece = models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=SPECIAL[1])
    tokenizer = Tokenizer(wordpiece)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((SPECIAL[3], SEP), (SPECIAL[2], CLS))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names).save_pretrained(folder)


def make_set(folder: Path) -> None:
    """Write a prepared set of all tasks."""
    train = [example for task in LABELLED for example in examples(task, 20)]
    write_set(folder, LABELLED, train, {task["name"]: examples(task, 12, seed=1) for task in LABELLED})


def examples(task: dict, count: int, seed: int = 0) -> list[dict]:
    """Random words; which label is right shows in the first of them."""
    draw = random.Random(f"{task['name']} {seed}")
    found = []
    for index in range(count):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(2)]
        if "labels" in task:
            label = draw.choice(task["labels"])
            first = WORDS[task["labels"].index(label) + 5 * task["id"]]
        else:
            label = round(draw.uniform(*task["regression"]), 2)
            first = WORDS[20 + round(label)]
        example = {"text": f"{first} {texts[0]}", "label": label, "task": task["name"]}
        if task["name"] != "tone":
            example["text_b"] = texts[1]
        found.append(example | ({"kind": "even" if index % 2 else "odd"} if task["name"] == "place" else {}))
    return found
