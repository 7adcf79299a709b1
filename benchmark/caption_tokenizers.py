"""How far caption metrics depend on the tokenizer: one reference caption against the others, with both tokenizers.

    python benchmark/caption_tokenizers.py dataset_flickr8k.zip --split test

FILE is Karpathy's JSON, or a zip file with it. Needs pycocoevalcap and Java. Prints CIDEr and BLEU-4 times 100.
"""

import argparse
import json
import zipfile
from pathlib import Path

from mtl_lora.errors import user_errors_to_exit_code
from mtl_lora.image_text.captions import PTB, SIMPLE, caption_rows, tokenizer_here
from mtl_lora.metrics import METRICS


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("file", type=Path)
    flags.add_argument("--split", help="train, val or test; none: all")
    flags.add_argument("--reference", type=int, default=0, help="index of the caption to score, from 0")
    given = flags.parse_args()
    content = given.file.read_bytes()
    if zipfile.is_zipfile(given.file):
        with zipfile.ZipFile(given.file) as opened:
            content = opened.read(next(name for name in opened.namelist() if name.endswith(".json")))
    images = [image for image in json.loads(content)["images"] if given.split in (None, image["split"])]
    texts = [[sentence["raw"] for sentence in image["sentences"]] for image in images]
    chosen = [each.pop(given.reference) for each in texts]
    print(f"{len(chosen):,} captions")
    for tokenizer in (tokenizer_here(PTB), SIMPLE):
        rows = caption_rows(chosen, texts, tokenizer)
        values = {name: METRICS[name].value_of(METRICS[name].written([row[name] for row in rows])) for name in rows[0]}
        print(f"{tokenizer:<7}", *(f"{name} {100 * value:.3f}" for name, value in sorted(values.items())))


if __name__ == "__main__":
    with user_errors_to_exit_code():
        main()
