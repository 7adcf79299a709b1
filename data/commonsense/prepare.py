"""Build the commonsense training file and test sets: download them or take a folder, verify, tag with task ids, merge.

    python data/commonsense/prepare.py                            download from LLM-Adapters, then write
    python data/commonsense/prepare.py --source DIR               take DIR/<task>/{train,test}.json instead
    python data/commonsense/prepare.py --merged commonsense_170k.json    tag that file, keeping its order

The output is one JSON list, one record a line, in ASCII (other characters escaped), so that it reads the same under
any locale: {instruction, input, output, answer, task_id}. A record's task is that of the file it came from. Records
stand in order of task id and then of their file, for training shuffles and a fixed order gives a fixed sha256.
Test sets are copied byte for byte.
"""

import argparse
import collections
import hashlib
import json
from pathlib import Path

from llm_adapters import (
    FIELDS,
    Expected,
    Manifest,
    SourceFile,
    load_manifest,
    read_records,
    read_source,
    record_problem,
)

from mtl_lora.download import fetch_all, git_blob_sha1, github_raw
from mtl_lora.errors import OneSentenceParser, UserError, files_within_reach, user_errors_to_exit_code
from mtl_lora.files import records_bytes, write_all
from mtl_lora.language.tasks import Task

FOLDER = Path(__file__).resolve().parent
NAMED = 5  # so many of the records without a place are named, the others counted


def download(manifest: Manifest, base_url: str | None, folder: Path) -> None:
    """Fetch every file that is not in ``folder`` yet to <folder>/<task>/<split>.json; raises ``UserError``."""
    files = {
        folder / name / f"{split}.json": (expected.path, expected.git_blob_sha1)
        for (name, split), expected in manifest.files.items()
    }
    fetched = fetch_all(base_url or github_raw(manifest.repository, manifest.commit), files)
    print(f"{fetched} files downloaded to {folder}, {len(files) - fetched} were there")


def tagged(record: dict, task: Task) -> dict:
    """The record as training reads it."""
    return {field: record[field] for field in FIELDS} | {"task_id": task.id}


def merge(sources: list[SourceFile]) -> list[dict]:
    """All training records, tagged with the task of the file they came from."""
    return [tagged(record, source.task) for source in sources if source.split == "train" for record in source.records]


def tag_by_lookup(path: Path, sources: list[SourceFile]) -> tuple[list[dict], list[str]]:
    """Tag a merged file's records, each by the task whose training file holds the very same instruction.

    Returns the tagged records and the names (index, opening words) of those that no task or several tasks hold.
    Raises ``UserError`` for a wrong record.
    """
    task_of: dict[str, Task | None] = {}
    for source in sources:
        for record in source.records if source.split == "train" else ():
            if task_of.setdefault(record["instruction"], source.task) is not source.task:
                task_of[record["instruction"]] = None
    placed, unplaced = [], []
    for index, record in enumerate(read_records(path)):
        task = task_of.get(record["instruction"])
        if task is None:
            unplaced.append(f"record {index} {json.dumps(record['instruction'][:60])}")
        elif problem := record_problem(record, task):
            raise UserError(f"{path}: record {index} {problem}")
        else:
            placed.append(tagged(record, task))
    return placed, unplaced


def describe_unplaced(path: Path, unplaced: list[str]) -> str:
    """Which records of the merged file have no task."""
    more = f" and {len(unplaced) - NAMED:,} more" if len(unplaced) > NAMED else ""
    return f"no single task's training file holds {', '.join(unplaced[:NAMED])}{more} of {path}"


def describe_merged(path: Path, records: int, expected: Expected) -> str:
    """Whether a merged file is the known one."""
    found = git_blob_sha1(path)
    if found == expected.git_blob_sha1:
        return f"{path} is the known merged file ({records:,} records, git blob {found})"
    return (
        f"{path} is not the known merged file: {records:,} of {expected.records:,} records, "
        f"git blob {found} instead of {expected.git_blob_sha1}"
    )


def write(flags: argparse.Namespace, sources: list[SourceFile], records: list[dict]) -> str:
    """Write the test sets, then the training file; returns the latter's sha256. Raises ``UserError``."""
    found = [source for source in sources if source.split == "test" and source.state != "missing"]
    tests = {flags.test_dir / source.task.name / "test.json": source.path.read_bytes() for source in found}
    taken = [*tests, *(source.path for source in sources), *([flags.merged] if flags.merged else [])]
    if flags.output.resolve() in [path.resolve() for path in taken]:
        raise UserError(f"--output {flags.output} is a test set or a file it is made from; choose another name")
    content = records_bytes(records)
    write_all({flags.output: content} | tests)
    return hashlib.sha256(content).hexdigest()


def table(sources: list[SourceFile], records: list[dict]) -> str:
    """One row a task: the training records written and the test records, each with the state of the file behind it."""
    written = collections.Counter(record["task_id"] for record in records)
    rows = [f"{'task':<14}{'id':>3}{'train':>10}  {'state':<8}{'test':>9}  state"]
    for train, test in zip(sources[::2], sources[1::2], strict=True):
        counts = f"{written[train.task.id]:>10,}  {train.state:<8}{len(test.records):>9,}  {test.state}"
        rows.append(f"{train.task.name:<14}{train.task.id:>3}{counts}")
    tests = sum(len(source.records) for source in sources[1::2])
    return "\n".join([*rows, f"{'total':<17}{len(records):>10,}  {'':<8}{tests:>9,}"])


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    """The command line as a namespace; raises ``UserError`` for what is no flag."""
    parser = OneSentenceParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    add = parser.add_flag
    add("source", "folder with <task>/{train,test}.json to take instead of downloading (default: download)", type=Path)
    output = FOLDER.parents[1] / "commonsense_170k_taskid.json"
    add("output", "training file to write (default: %(default)s)", type=Path, default=output)
    add("test_dir", "folder for <task>/test.json (default: %(default)s)", type=Path, default=FOLDER / "test")
    add("merged", "commonsense_170k.json to tag by exact instruction instead (default: merge the files)", type=Path)
    add("allow_partial", "write what there is of an incomplete source (default: off, refuse)", action="store_true")
    add("download_dir", "where downloads are kept (default: %(default)s)", type=Path, default=FOLDER / "source")
    add("base_url", "address of a mirror that holds the manifest's paths (default: the repository's commit on GitHub)")
    add("manifest", "what each file must be (default: %(default)s)", type=Path, default=FOLDER / "manifest.json")
    flags = parser.parse_args(arguments)
    if flags.source and flags.base_url:
        raise UserError("--source takes a folder and --base_url downloads; pass one of them")
    return flags


def prepare(flags: argparse.Namespace) -> None:
    """Read everything, check everything, and only then write; raises ``UserError``."""
    manifest = load_manifest(flags.manifest)
    if not flags.source:
        download(manifest, flags.base_url, flags.download_dir)
    folder = flags.source or flags.download_dir
    sources = read_source(folder, manifest)
    problems = [source.describe() for source in sources if source.state != "exact"]
    records = merge(sources)
    whole = sum(source.expected.records for source in sources if source.split == "train")
    if problems and not flags.allow_partial:
        raise UserError(
            f"{folder} is incomplete or inexact ({len(records):,} of {whole:,} training records): "
            f"{'; '.join(problems)}; complete it or pass --allow-partial"
        )
    if flags.merged:
        records, unplaced = tag_by_lookup(flags.merged, sources)
        if unplaced and not flags.allow_partial:
            raise UserError(f"{describe_unplaced(flags.merged, unplaced)}; --allow-partial leaves them out")
        problems += [describe_unplaced(flags.merged, unplaced)] if unplaced else []
        problems += [describe_merged(flags.merged, len(records) + len(unplaced), manifest.merged)]
    if not records:
        raise UserError(f"{flags.merged or folder} gives no training record; nothing was written")
    digest = write(flags, sources, records)
    print("\n".join([table(sources, records), *problems]))
    print(f"{len(records):,} of {whole:,} training records in {flags.output}\nsha256 {digest}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    with user_errors_to_exit_code(), files_within_reach():
        prepare(parse_flags(arguments))


if __name__ == "__main__":
    main()
