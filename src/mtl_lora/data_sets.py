"""What the preparations of task sets share: their manifest, seeded samples, the files of a set, its table of counts."""

import dataclasses
import random
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from mtl_lora.download import RemoteFile, check_source, fetch_all, github_raw
from mtl_lora.errors import UserError
from mtl_lora.files import read_json, records_bytes, sha256_of, write_all

SPLITS = ("train", "dev", "test")
Examples = list[dict]
Sets = dict[str, dict[str, Examples]]  # by task name, in order of task id, and split
Sizes = dict[str, dict[str, int]]  # the known number of examples by task name and split
Entry = typing.TypeVar("Entry")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a task set in a public repository, by task name and what each holds, and the sizes of the set."""

    url: str
    files: dict[str, dict[str, RemoteFile]]
    sizes: Sizes

    @classmethod
    def load(cls, path: str | Path, names: Iterable[str], example: Path) -> typing.Self:
        """Read what a manifest says of the tasks ``names``; raises ``UserError``. example: one that is right."""
        value = read_json(path, "the manifest")
        try:
            entries = {name: value["tasks"][name] for name in names}
            files = {
                name: {part: RemoteFile.from_json(raw, f"{name}/{part}") for part, raw in entry["files"].items()}
                for name, entry in entries.items()
            }
            sizes = {name: {part: int(entry["records"][part]) for part in SPLITS} for name, entry in entries.items()}
            return cls(github_raw(value["repository"], value["commit"]), files, sizes)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"the manifest {path} must be laid out as {example}; missing or wrong: {error}") from None

    def get(self, source: str | None, download_dir: str, base_url: str | None) -> Path:
        """The folder that holds all files with their known bytes: ``source``, or downloads; raises ``UserError``."""
        raw_files = {raw.path: raw for parts in self.files.values() for raw in parts.values()}
        folder = existing(source) if source else Path(download_dir)
        if not source:
            fetch_all(base_url or self.url, folder, raw_files)
        check_source(folder, raw_files)
        return folder


def existing(folder: str) -> Path:
    """The folder; raises ``UserError`` if it is none."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; pass the one that --help describes")
    return Path(folder)


def shuffled(entries: Iterable[Entry]) -> list[Entry]:
    """The same entries in the order that seed 0 gives."""
    entries = list(entries)
    random.Random(0).shuffle(entries)
    return entries


def sampled(entries: Sequence[Entry], count: int) -> tuple[list[Entry], list[Entry]]:
    """(``count`` entries, the others), both in order: the first of a shuffle, so that a larger count adds to them."""
    chosen = set(shuffled(range(len(entries)))[:count])
    parts = [], []
    for index, entry in enumerate(entries):
        parts[index not in chosen].append(entry)
    return parts


def content(*texts: str) -> frozenset[str]:
    """What makes two examples the same: letters and digits of their texts, in either order; empty if a text is.

    STS-B holds pairs of MRPC, and film reviews are in SST and in SUBJ, with other spaces, quotation marks and capitals.
    """
    return frozenset(re.sub(r"[\W_]+", "", text.casefold()) or text for text in texts) if all(texts) else frozenset()


def write_sets(folder: Path, sets: Sets, sizes: Sizes, limit: int, tasks_file: bytes, kept: Iterable[Path] = ()) -> str:
    """Write train.json, tasks.json, dev/ and test/; returns the table of counts and the training file's sha256.

    limit: most training examples of a task; 0: all. kept: files that must not be written over. Raises ``UserError``.
    """
    empty = [f"{name}/{part}" for name, parts in sets.items() for part in SPLITS if not parts[part]]
    if empty:
        raise UserError(f"no example is left for {', '.join(empty)}; nothing was written")
    train = {name: sampled(parts["train"], limit)[0] if limit else parts["train"] for name, parts in sets.items()}
    output = folder / "train.json"
    examples = {output: [example for part in train.values() for example in part]}
    for part in ("dev", "test"):
        examples |= {folder / part / name / "test.json": parts[part] for name, parts in sets.items()}
    contents = {path: records_bytes(records) for path, records in examples.items()}
    contents[folder / "tasks.json"] = tasks_file
    if {path.resolve() for path in kept} & {path.resolve() for path in contents}:
        raise UserError(f"--output_dir {folder} would write over the files that are read; choose another folder")
    write_all(contents)
    digest = sha256_of(contents[output])
    counts = table({name: {**parts, "train": train[name]} for name, parts in sets.items()})
    notes = [
        f"{name}/{part} has {len(sets[name][part]):,} examples where the known set has {known:,}"
        for name in sets
        for part, known in sizes[name].items()
        if len(sets[name][part]) != known
    ]
    return "\n".join([*counts, *notes, f"{len(examples[output]):,} training examples in {output}", f"sha256 {digest}"])


def table(sets: Sets) -> list[str]:
    """One row a task: the examples of each split."""
    rows = [f"{'task':<8}{'id':>3}{'train':>9}{'dev':>8}{'test':>8}"]
    for index, (name, parts) in enumerate(sets.items()):
        counts = [len(parts[part]) for part in SPLITS]
        rows.append(f"{name:<8}{index:>3}{counts[0]:>9,}{counts[1]:>8,}{counts[2]:>8,}")
    return rows
