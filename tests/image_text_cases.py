"""Tiny models that read pictures, features, and tasks of every kind of answer."""

import json
import random
from pathlib import Path

from shared import save_llama, trained_bpe, write_set

TASKS = [
    {"name": "vqa", "id": 0, "prompt": "vqa: {text}", "metric": "vqa_accuracy", "max_text": 20, "max_answer": 10},
    {"name": "nlvr", "id": 1, "prompt": "nlvr: {text}", "answer": "choice", "labels": ["false", "true"]},
    {"name": "caption", "id": 2, "prompt": "caption:", "answer": "caption", "max_answer": 12, "metric": "bleu4"},
]
WORDS = ["red", "blue", "green", "box", "ball", "dog", "two", "three", "left", "right", "is", "the", "a", "what", "on"]
GRID, DIM = 3, 8  # of the features
PICTURES = [f"p{number}" for number in range(8)]


def make_tokenizer(folder: Path, bart: bool) -> None:
    """A byte-level BPE: of a BART <s> text </s>; of a causal model nothing around it, EOS </s>, no pad token."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    texts = [
        f"{task['prompt']} {' '.join(WORDS)}?true false {first}{last}"
        for task in TASKS
        for first in WORDS
        for last in WORDS
    ]
    tokenizer = trained_bpe(texts, 400, ["<s>", "<pad>", "</s>", "<unk>"] if bart else ["</s>"])
    names = {"eos_token": "</s>"}
    if bart:
        around = [("<s>", 0), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
        names |= {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def make_bart(folder: Path, width: int = 16, spread: float = 0.4, dropout: float = 0.1) -> None:
    """A random BART of two layers a side; spread: of its weights, here so large that its logits differ."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    make_tokenizer(folder, bart=True)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
    torch.manual_seed(0)
    sizes |= {"d_model": width, "init_std": spread, "dropout": dropout}
    config = BartConfig(vocab_size=400, max_position_embeddings=96, **sizes)
    BartForConditionalGeneration(config).save_pretrained(folder)


def make_causal(folder: Path) -> None:
    """A random LLaMA of two layers."""
    make_tokenizer(folder, bart=False)
    save_llama(folder, 400, width=16, positions=128, spread=0.4)


def write_features(path: Path, images=PICTURES, grid: int = GRID, dim: int = DIM, made_by: str = "aaa") -> None:
    """An HDF5 file with random features of the images, as of a vision model of this fingerprint."""
    import h5py
    import torch

    with h5py.File(path, "w") as opened:
        opened.attrs["mtl_lora"] = json.dumps({"model": "tiny", "fingerprint": made_by, "size": 98})
        for image in images:
            generator = torch.Generator().manual_seed(hash_of(image))
            opened.create_group(image)["features"] = torch.randn(grid * grid, dim, generator=generator).numpy()


def make_set(folder: Path) -> None:
    """Write a prepared set of all tasks, and its features."""
    names = [task["name"] for task in TASKS]
    train = [example for name in names for example in examples(name, 16)]
    write_set(folder, TASKS, train, {name: examples(name, 9, seed=1, closed=True) for name in names})
    write_features(folder / "features.h5")


def hash_of(text: str) -> int:
    """A number of a text, the same in every process."""
    return int.from_bytes(text.encode()) % 2**31


def examples(task: str, count: int, seed: int = 0, closed: bool = False) -> list[dict]:
    """Random questions with soft scores, statements about one picture or two, and captions. closed: of a test set."""
    draw, found = random.Random(f"{task} {seed}"), []
    for index in range(count):
        image = draw.choice(PICTURES)
        text = " ".join(draw.choices(WORDS, k=draw.randint(2, 7)))
        example = {"task": task, "image": image}
        if task == "vqa":
            example |= {"text": f"{text}?", "answers": {draw.choice(WORDS[:3]): 1.0, draw.choice(WORDS[3:6]): 0.3}}
        elif task == "nlvr":
            example["image"] = [image, draw.choice(PICTURES)] if index % 2 else image
            example |= {"text": f"{text}.", "answer": draw.choice(["true", "false"]), "group": index // 3}
        else:
            example |= {"answers": [text, f"a {text}"]} if closed else {"answer": text}
        found.append(example)
    return found
