"""Make examples from the data folder of VL-Adapter and MTL-LoRA's image-text code: VQAv2, GQA, NLVR2, COCO captions.

    mtl-lora prepare vlbart --source datasets                       all four tasks
    mtl-lora prepare vlbart --source datasets --tasks vqa,nlvr      some of them

Reads these files of the source folder

    vqa/karpathy_{train,val,test}.json, vqa/v2_mscoco_val2014_annotations.json
    GQA/{train,valid,testdev}.json
    nlvr/{train,valid,test}.json
    COCO/dataset_coco.json

and checks that each of their images has its <image id>.h5 in {COCO,VG,GQA,nlvr}/clip_features/data_clip_RN101_att, the
--features of training, which checks their shapes. Writes train.json (all tasks, in order of task id), tasks.json (the
--tasks_file of training), dev/<task>/test.json and test/<task>/test.json (each a --data_dir of evaluation).

As in the original, GQA is tested on testdev and trained on train and valid, except for 200 images of valid that are the
dev set here; the original evaluates on testdev during training. Paths are relative to the current folder.
"""

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from mtl_lora.config import REQUIRED, Config, closest, flag
from mtl_lora.data_sets import Examples, existing, write_sets
from mtl_lora.errors import UserError
from mtl_lora.files import read_json
from mtl_lora.image_text.examples import parse_example
from mtl_lora.image_text.prepare import divided, karpathy, limited
from mtl_lora.image_text.tasks import VLBART

FEATURES = "clip_features/data_clip_RN101_att"
FEATURE_FOLDERS = {"vqa": ["COCO"], "gqa": ["VG", "GQA"], "nlvr": ["nlvr"], "caption": ["COCO"]}
GQA_DEV_IMAGES = 200  # images of valid in the dev set, or a tenth of them if that is fewer


@dataclasses.dataclass
class Prepare(Config):
    """Where the original's folder is, which of its tasks to build, and where the data sets go."""

    source: str = flag(REQUIRED, "the folder datasets/ of the original, with vqa, GQA, nlvr and COCO")
    tasks: list[str] = flag(VLBART.names, "tasks among vqa, gqa, nlvr and caption, as a,b; ids are in that order")
    output_dir: str = flag("data/vlbart", "folder for train.json, tasks.json, dev/ and test/", place=True)
    limit: int = flag(0, "maximum training images (nlvr: pairs) per task, with all their examples; 0: all", min=0)


class Source:
    """The files in a folder, and for each file or folder with problems the first problem and the number of problems."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: dict[str, list] = {}

    def wrong(self, name: str, what: str) -> None:
        """Record a problem with a file."""
        self.problems.setdefault(name, [what, 0])[1] += 1

    def check(self) -> None:
        """Raise ``UserError`` naming every file that is missing or malformed, if there is one."""
        named = [
            f"{name}: {what}" + (f" (the first of {count:,})" if count > 1 else "")
            for name, (what, count) in self.problems.items()
        ]
        if named:
            raise UserError(f"{self.folder} has missing or malformed files: {'; '.join(named)}")

    def items(self, name: str, key: str | None = None) -> list:
        """Return the JSON list in a file, or under ``key`` in its object; if there is none, record a problem and return
        an empty list."""
        try:
            value = read_json(self.folder / name, "the file")
            value = value[key] if key else value
            if isinstance(value, list) and value:
                return value
            self.wrong(name, "it must hold a JSON list of questions")
        except (KeyError, TypeError):
            self.wrong(name, f"it must be a JSON object with the key {key}")
        except UserError as error:
            self.wrong(name, str(error) if (self.folder / name).is_file() else "it is missing")
        return []

    def read(self, name: str, task: str, closed: bool, convert: Callable[[dict], dict]) -> Examples:
        """Return ``convert(item)`` for each item of a file; an item that gives no valid example is recorded.

        closed: True for dev and test sets, where every question needs a right answer.
        """
        found = []
        for index, item in enumerate(self.items(name)):
            try:
                example = {"task": task, **convert(item)}
                parse_example(example, index, name, VLBART, task, closed)
                found.append(example)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                self.wrong(name, f"item {index} lacks {error}, or has a value of another type")
            except UserError as error:
                self.wrong(name, str(error).removeprefix(f"{name}, "))
        return found

    def check_features(self, task: str, parts: dict[str, Examples]) -> None:
        """Record the images that have no features."""
        folders = [f"{folder}/{FEATURES}" for folder in FEATURE_FOLDERS[task]]
        there = {path.stem for folder in folders for path in (self.folder / folder).glob("*.h5")}
        for example in (example for part in parts.values() for example in part):
            images = example["image"]
            for image in map(str, images if isinstance(images, list) else [images]):
                if image not in there:
                    there.add(image)
                    self.wrong(" or ".join(folders), f"{image}.h5 is missing")


def run(config: Prepare) -> None:
    """Read and check everything before writing anything; raises ``UserError``."""
    if unknown := [name for name in config.tasks if name not in VLBART.names]:
        raise UserError(f"--tasks names {unknown[0]!r}{closest(unknown[0], VLBART.names)}")
    source, sets = Source(existing(config.source)), {}
    for name in (name for name in VLBART.names if name in (config.tasks or VLBART.names)):
        sets[name] = READERS[name](source)
        source.check_features(name, sets[name])
    source.check()
    if config.limit:
        for parts in sets.values():
            parts["train"] = limited(parts["train"], config.limit)
    entries = [{**VLBART[name].to_json(), "id": number} for number, name in enumerate(sets)]
    tasks_file = json.dumps({"tasks": entries}, indent=1) + "\n"
    print(write_sets(Path(config.output_dir), sets, {name: {} for name in sets}, 0, tasks_file.encode()))
    folders = dict.fromkeys(folder for name in sets for folder in FEATURE_FOLDERS[name])
    print(f"--features {','.join(str(source.folder / folder / FEATURES) for folder in folders)}")


def read_vqa(source: Source) -> dict[str, Examples]:
    """Return questions with soft scores; dev and test, from COCO's val2014, also have the answers of ten annotators."""
    annotators = {}
    name = "vqa/v2_mscoco_val2014_annotations.json"
    for index, entry in enumerate(source.items(name, "annotations")):
        try:
            annotators[str(entry["question_id"])] = [answer["answer"] for answer in entry["answers"]]
        except (KeyError, TypeError):
            source.wrong(name, f"annotation {index} has no question_id or answers")

    def question(item: dict) -> dict:
        text = item["sent"] if "sent" in item else item["question"]
        kind = {"kind": item["answer_type"]} if item.get("answer_type") else {}
        return {"image": item["img_id"], "text": text, "answers": item["label"], **kind}

    def tested(item: dict) -> dict:
        if str(item["question_id"]) not in annotators:
            raise UserError(f"the question {item['question_id']} has no answers in {name}")
        answers = annotators[str(item["question_id"])]
        # ``label`` is empty if no answer is in the training vocabulary; then the annotators' answers give the scores.
        scores = {
            answer: min(1.0, count / 3) for answer, count in collections.Counter(answers).items() if answer.strip()
        }
        return question(item) | {"answers": item["label"] or scores, "annotators": answers}

    files = {"train": "karpathy_train", "dev": "karpathy_val", "test": "karpathy_test"}
    return {
        part: source.read(f"vqa/{file}.json", "vqa", part != "train", question if part == "train" else tested)
        for part, file in files.items()
    }


def read_gqa(source: Source) -> dict[str, Examples]:
    """Return questions with one answer; dev has the questions about some images of valid."""

    def question(item: dict) -> dict:
        return {"image": item["img_id"], "text": item["sent"], "answers": item["label"]}

    train, valid, test = (
        source.read(f"GQA/{part}.json", "gqa", part == "testdev", question) for part in ("train", "valid", "testdev")
    )
    dev, others = divided(valid, lambda example: example["image"], GQA_DEV_IMAGES)
    return {"train": train + others, "dev": dev, "test": test}


def read_nlvr(source: Source) -> dict[str, Examples]:
    """Return statements about two photographs; those that differ only in the pair, the third field of their identifier,
    share a group."""

    def statement(item: dict) -> dict:
        fields, answers = item["identifier"].split("-"), {0: "false", 1: "true"}
        if item["label"] not in answers:
            raise UserError(f"the label of {item['identifier']} must be 0 or 1, not {item['label']!r}")
        images, group = [item["img0"], item["img1"]], "-".join([*fields[:2], fields[3]])
        return {"image": images, "text": item["sent"], "answer": answers[item["label"]], "group": group}

    files = {"train": "train", "dev": "valid", "test": "test"}
    return {part: source.read(f"nlvr/{file}.json", "nlvr", part != "train", statement) for part, file in files.items()}


def read_captions(source: Source) -> dict[str, Examples]:
    """Return captions in Karpathy's split."""
    name, found = "COCO/dataset_coco.json", {"train": [], "dev": [], "test": []}
    try:
        karpathy(source.folder / name, "caption", found)
    except UserError as error:
        source.wrong(name, str(error) if (source.folder / name).is_file() else "it is missing")
    return found


READERS = {"vqa": read_vqa, "gqa": read_gqa, "nlvr": read_nlvr, "caption": read_captions}
