"""Shared code of the ``prepare`` commands: manifests, seeded samples, writing data sets, and their table of counts."""

import dataclasses
import random
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from mtl_lora.download import RemoteFile, fetch_all, git_blob_sha1, github_raw
from mtl_lora.errors import UserError
from mtl_lora.files import read_json, records_bytes, sha256_of, write_all

SPLITS = ("train", "dev", "test")
DEV_PART, MOST_DEV = 10, 2000  # a missing dev set is sampled from the training set: one example in 10, at most 2,000
Examples = list[dict]
Sets = dict[str, dict[str, Examples]]  # task name, in order of task id -> split -> examples
Sizes = dict[str, dict[str, int]]  # task name -> split -> known number of examples
Entry = typing.TypeVar("Entry")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The files of a task set in a public repository, by task name and part, and the known sizes of the set."""

    url: str
    files: dict[str, dict[str, RemoteFile]]
    sizes: Sizes

    @classmethod
    def load(cls, path: str | Path, names: Iterable[str], example: Path) -> typing.Self:
        """Read a manifest's entries for the tasks ``names``; raises ``UserError``, naming a valid ``example``."""
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
        """Return a folder with all files, verified: ``source``, or ``download_dir`` after downloading what is missing.

        Raises ``UserError`` for files that are missing or have other bytes.
        """
        files, problems = {file.path: file for parts in self.files.values() for file in parts.values()}, []
        if not source:
            fetch_all(base_url or self.url, Path(download_dir), files)
            return Path(download_dir)
        folder = existing(source)
        for name, file in files.items():
            if not (folder / name).is_file():
                problems.append(f"{name} is missing")
            elif (blob := git_blob_sha1(folder / name)) != file.git_blob_sha1:
                problems.append(f"{name} has other bytes (git blob {blob} instead of {file.git_blob_sha1})")
        if problems:
            raise UserError(
                f"{folder} does not hold the source files: {'; '.join(problems)}; without --source they are downloaded"
            )
        return folder


def existing(folder: str) -> Path:
    """Return ``folder`` as a path; raises ``UserError`` if it is not a folder."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; pass the one that --help describes")
    return Path(folder)


def shuffled(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries shuffled with seed 0."""
    entries = list(entries)
    random.Random(0).shuffle(entries)
    return entries


def split_off(entries: Sequence[Entry], count: int) -> tuple[list[Entry], list[Entry]]:
    """Return (``count`` sampled entries, the others), both in their order; larger samples contain smaller ones."""
    chosen = set(shuffled(range(len(entries)))[:count])
    parts = [], []
    for index, entry in enumerate(entries):
        parts[index not in chosen].append(entry)
    return parts


def content(*texts: str) -> frozenset[str]:
    """Return a key that is equal for duplicate examples: their texts' letters and digits, in either order of the texts.

    The key is empty if a text is empty. Duplicates exist across data sets: STS-B has pairs of MRPC, and SST and SUBJ
    share film reviews, with different spaces, quotation marks and capitals.
    """
    return frozenset(re.sub(r"[\W_]+", "", text.casefold()) or text for text in texts) if all(texts) else frozenset()


def separated(sets: Sets) -> tuple[Sets, list[str]]:
    """Return the sets, each with a dev set and without overlap between splits, and a note of what was dropped.

    No training example has the ``content`` of an example in any task's dev or test set, and no dev example has that of
    a test example. A missing dev set is sampled from the rest of the training set. Examples with an empty text are
    dropped too.
    """

    def keyed_by_content(examples: Examples) -> list[tuple[frozenset, dict]]:
        return [(content(*(each[key] for key in ("text", "text_b") if key in each)), each) for each in examples]

    keyed = {name: {part: keyed_by_content(given) for part, given in parts.items()} for name, parts in sets.items()}
    held = {content("")}
    for part in reversed(SPLITS):
        for parts in keyed.values():
            if part not in parts:
                rest = [pair for pair in parts["train"] if pair[0] not in held]
                parts[part], parts["train"] = split_off(rest, min(len(rest) // DEV_PART, MOST_DEV))
            parts[part] = [pair for pair in parts[part] if pair[0] not in held]
        held |= {key for parts in keyed.values() for key, _ in parts[part]}
    found = {
        name: {part: [each for _, each in pairs] for part, pairs in parts.items()} for name, parts in keyed.items()
    }
    lost = {name: sum(map(len, sets[name].values())) - sum(map(len, found[name].values())) for name in sets}
    dropped = [f"{name} {count:,}" for name, count in lost.items() if count]
    notes = [f"dropped because their texts are empty or in a dev or test set: {', '.join(dropped)}"] if dropped else []
    return found, notes


def write_sets(folder: Path, sets: Sets, sizes: Sizes, limit: int, tasks_file: bytes, kept: Iterable[Path] = ()) -> str:
    """Write train.json, tasks.json, dev/ and test/; return the table of counts and the training file's sha256 as text.

    limit: maximum training examples per task; 0: all. kept: files that must not be overwritten. Raises ``UserError``
    for an empty split, and for an output path among ``kept``.
    """
    empty = [f"{name}/{part}" for name, parts in sets.items() for part in SPLITS if not parts[part]]
    if empty:
        raise UserError(f"no example is left for {', '.join(empty)}; nothing was written")
    train = {name: split_off(parts["train"], limit)[0] if limit else parts["train"] for name, parts in sets.items()}
    output = folder / "train.json"
    examples = {output: [example for part in train.values() for example in part]}
    for part in ("dev", "test"):
        examples |= {folder / part / name / "test.json": parts[part] for name, parts in sets.items()}
    contents = {path: records_bytes(records) for path, records in examples.items()}
    contents[folder / "tasks.json"] = tasks_file
    if {path.resolve() for path in kept} & {path.resolve() for path in contents}:
        raise UserError(f"--output_dir {folder} would overwrite the input files; pass another folder")
    write_all(contents)
    digest = sha256_of(contents[output])
    counts = [f"{'task':<8}{'id':>3}{'train':>9}{'dev':>8}{'test':>8}"]
    for index, (name, parts) in enumerate(sets.items()):
        row = f"{name:<8}{index:>3}{len(train[name]):>9,}"
        counts.append(f"{row}{len(parts['dev']):>8,}{len(parts['test']):>8,}")
    notes = [
        f"{name}/{part} has {len(sets[name][part]):,} examples where the known set has {known:,}"
        for name in sets
        for part, known in sizes[name].items()
        if len(sets[name][part]) != known
    ]
    return "\n".join([*counts, *notes, f"{len(examples[output]):,} training examples in {output}", f"sha256 {digest}"])
