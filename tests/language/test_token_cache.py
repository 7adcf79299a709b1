"""Encoded examples on disk: made once for everything that shapes them, and nothing half-made ever found there."""

import dataclasses
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
from text_cases import INSTRUCTIONS, example, record
from transformers import AutoTokenizer

from mtl_lora.errors import UserError
from mtl_lora.language import batches
from mtl_lora.language.batches import training_rows
from mtl_lora.language.encode import Encoder
from mtl_lora.language.tasks import COMMONSENSE, Task, TaskSet
from mtl_lora.training import rows
from mtl_lora.training.rows import row_columns, rows_sha256, shortened_note, split, tokenizer_hash

CUTOFF = 128
RECORDS = [
    record(task, instruction="Think well. " * repeats + INSTRUCTIONS[task])
    for repeats in (0, 30)
    for task in COMMONSENSE.names
]
RENAMED = TaskSet(tuple(Task(f"other-{task.name}", task.id, task.options) for task in COMMONSENSE))
PATTERNED = TaskSet(tuple(Task(task.name, task.id, task.options, pattern=task.answer_pattern) for task in COMMONSENSE))


def with_boolq(**changes) -> TaskSet:
    """The eight tasks, the first of them changed."""
    boolq, *others = COMMONSENSE
    return TaskSet((dataclasses.replace(boolq, **changes), *others))


@pytest.fixture
def rows_of(tokenizers, tmp_path):
    """Encode a data file with defaults that a test may change one by one."""
    (tmp_path / "train.json").write_text(json.dumps(RECORDS))

    def make(path=None, tokenizer=None, template="alpaca", cutoff=CUTOFF, tasks=COMMONSENSE, cache=None):
        tokenizer = tokenizer or tokenizers["llama3"]
        path, cache = path or tmp_path / "train.json", cache or tmp_path / "cache"
        return training_rows(path, Encoder(tokenizer, template, cutoff, tasks), cache)

    return make


@pytest.fixture
def no_tokenising(monkeypatch):
    """Any call of the encoder fails the test."""

    def refuse(*arguments, **options):
        raise AssertionError("rows in the cache must not be tokenised again")

    return lambda: monkeypatch.setattr(batches.Encoder, "encode", refuse)


def cached(tmp_path) -> list[str]:
    """Everything in the cache folder, hidden files too."""
    return sorted(path.name for path in (tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []


def test_rows_are_what_the_encoder_gives(rows_of, tokenizers):
    examples = [example(COMMONSENSE[r["task_id"]].name, instruction=r["instruction"]) for r in RECORDS]
    expected = Encoder(tokenizers["llama3"], "alpaca", CUTOFF, COMMONSENSE).encode(examples)
    rows = rows_of()
    assert len(rows) == len(expected)
    for row, encoded in zip(rows, expected, strict=True):
        assert row["input_ids"] == encoded.prompt_ids + encoded.answer_ids
        assert row["length"] == len(row["input_ids"]) <= CUTOFF
        assert (row["prompt_length"], row["task_id"], row["removed"]) == (
            len(encoded.prompt_ids),
            encoded.task_id,
            encoded.removed,
        )


def test_rows_longer_than_one_chunk_keep_their_order(rows_of, monkeypatch):
    whole = rows_of()[:]
    monkeypatch.setattr(rows, "_CHUNK", 3)
    monkeypatch.setattr(batches, "_VERSION", "another")  # so that the cache is not read
    assert rows_of()[:] == whole


def test_same_settings_reuse_the_cache_without_tokenising(rows_of, tmp_path, no_tokenising):
    first, folders = rows_of(), cached(tmp_path)
    no_tokenising()
    assert rows_of()[:] == first[:]
    assert cached(tmp_path) == folders and len(folders) == 1


def test_another_name_with_the_same_bytes_reuses_the_cache(rows_of, tmp_path, no_tokenising):
    rows_of()
    (tmp_path / "copy.json").write_bytes((tmp_path / "train.json").read_bytes())
    no_tokenising()
    rows_of(path=tmp_path / "copy.json")


def test_the_same_bytes_as_another_kind_of_file_are_read_anew(rows_of, tmp_path):
    rows_of()
    (tmp_path / "train.csv").write_bytes((tmp_path / "train.json").read_bytes())
    with pytest.raises(UserError, match=r"train\.csv"):
        rows_of(path=tmp_path / "train.csv")


CHANGES = {
    "template": lambda tokenizers: {"template": "original"},
    "cutoff": lambda tokenizers: {"cutoff": CUTOFF + 1},
    "tasks": lambda tokenizers: {"tasks": RENAMED},
    "a pattern": lambda tokenizers: {"tasks": PATTERNED},
    "options": lambda tokenizers: {"tasks": with_boolq(options=("true", "false", "nobody can know"))},
    "what stands before an answer": lambda tokenizers: {"tasks": with_boolq(answer_prefix="answer is ")},
    "a question": lambda tokenizers: {"tasks": with_boolq(question="Is it so?")},
    "tokenizer": lambda tokenizers: {"tokenizer": tokenizers["gpt2"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_every_setting_that_shapes_rows_has_a_cache_of_its_own(rows_of, tmp_path, tokenizers, change):
    first = rows_of()
    second = rows_of(**change(tokenizers))
    assert len(cached(tmp_path)) == 2
    assert len(second) == len(first)
    assert rows_of()[:] == first[:], "the first cache must be left alone"


def test_changed_byte_in_the_data_has_a_cache_of_its_own(rows_of, tmp_path):
    first = rows_of()
    changed = [{**RECORDS[0], "output": "the correct answer is false", "answer": "false"}, *RECORDS[1:]]
    (tmp_path / "train.json").write_text(json.dumps(changed))
    rows = rows_of()
    assert len(cached(tmp_path)) == 2
    assert rows[0]["input_ids"] != first[0]["input_ids"] and rows[1:] == first[1:]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "is not JSON"),
        (
            json.dumps([*RECORDS, {"instruction": "a", "output": "b", "answer": "b"}]),
            "example 16 has no field 'task_id'",
        ),
        (
            json.dumps([*RECORDS, record("boolq", output="word " * 300 + "the correct answer is true")]),
            r"example 16: the answer alone has \d+ tokens",
        ),
    ],
    ids=["broken JSON", "bad example", "answer too long"],
)
def test_refused_data_names_the_file_and_leaves_nothing_in_the_cache(rows_of, tmp_path, content, message):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        rows_of()
    assert str(tmp_path / "train.json") in str(caught.value)
    assert cached(tmp_path) == []


def test_titles_and_columns_of_the_tasks_shape_nothing(rows_of, no_tokenising):
    rows_of()
    no_tokenising()
    retitled = [dataclasses.replace(task, title=f"Title of {task.name}") for task in COMMONSENSE]
    rows_of(tasks=TaskSet(tuple(retitled), tuple(reversed(COMMONSENSE.names))))


def test_two_runs_that_encode_the_same_file_at_once_encode_it_once(rows_of, tmp_path, monkeypatch):
    encode, both, calls = batches.Encoder.encode, threading.Barrier(2), []

    def slow(self, examples):
        calls.append(examples)
        time.sleep(0.2)
        return encode(self, examples)

    def start(_) -> int:
        both.wait()
        return len(rows_of())

    monkeypatch.setattr(batches.Encoder, "encode", slow)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(start, range(2))) == [len(RECORDS)] * 2
    assert len(calls) == len(cached(tmp_path)) == 1


def test_data_file_that_changes_while_it_is_read_is_refused(rows_of, tmp_path, monkeypatch):
    load = batches.load_examples

    def replaced_before(path, *options):
        path.write_text(json.dumps(RECORDS[1:]))
        return load(path, *options)

    with monkeypatch.context() as patched:
        patched.setattr(batches, "load_examples", replaced_before)
        with pytest.raises(UserError, match=r"train\.json was changed"):
            rows_of()
    assert cached(tmp_path) == [] and len(rows_of()) == len(RECORDS) - 1


def test_missing_data_file_is_named(rows_of, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        rows_of(path=tmp_path / "nowhere.json")


def test_failure_while_saving_leaves_nothing_in_the_cache(rows_of, tmp_path, monkeypatch):
    def full_disk(self, *arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full_disk)
        patched.setattr(datasets.arrow_writer.ArrowWriter, "write_batch", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            rows_of()
    assert cached(tmp_path) == []
    assert len(rows_of()) == len(RECORDS)


def test_cache_folder_that_can_not_be_written_is_one_sentence(rows_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache folder .*file/cache cannot be written \(.+\); pass another"):
        rows_of(cache=tmp_path / "file" / "cache")


def test_tokenizer_hash_is_of_what_the_tokenizer_does_not_of_where_it_lies(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here, there = (AutoTokenizer.from_pretrained(str(tmp_path / name)) for name in ("here", "there"))
    assert tokenizer_hash(here) == tokenizer_hash(there)
    there(["a text", "another one"])
    assert tokenizer_hash(here) == tokenizer_hash(there), "using a tokenizer does not change it"
    there.add_tokens(["lighthouse"])
    assert tokenizer_hash(here) != tokenizer_hash(there)


def test_tokenizers_of_different_kinds_have_different_hashes(tokenizers):
    assert len({tokenizer_hash(tokenizer) for tokenizer in tokenizers.values()}) == len(tokenizers)


@pytest.mark.parametrize(
    ("one", "other"), [([[1, 2], [3]], [[1], [2, 3]]), (["ab", "c"], ["a", "bc"]), ([1, 2], [2, 1])], ids=str
)
def test_the_hash_of_rows_is_of_where_each_value_stands(one, other):
    first, second = (rows_sha256(datasets.Dataset.from_dict({"x": values})) for values in (one, other))
    assert first != second


# ---- number columns and the note on shortened rows ----

SELECTIONS = {
    "all": lambda rows: rows,
    "scattered": lambda rows: rows.select([5, 2, 11, 3]),
    "a stretch": lambda rows: rows.select(range(4, 9)),
    "twice": lambda rows: rows.select([5, 2, 11, 3]).select([2, 0]),
    "a stretch of scattered": lambda rows: rows.select([5, 2, 11, 3]).select(range(1, 3)),
    "scattered from a stretch": lambda rows: rows.select(range(4, 9)).select([3, 0]),
    "shuffled": lambda rows: rows.shuffle(seed=1),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=list(SELECTIONS))
def test_columns_are_those_of_the_selected_rows(rows_of, selection):
    rows = selection(rows_of())
    columns = row_columns(rows)
    assert set(columns) == {"prompt_length", "length", "task_id", "removed"}
    for name, column in columns.items():
        assert isinstance(column, np.ndarray)
        assert column.tolist() == [row[name] for row in rows]


def test_note_counts_shortened_examples_and_removed_tokens(rows_of):
    rows = rows_of()
    whole = rows_of(cutoff=4096)
    lost = [len(a["input_ids"]) - len(b["input_ids"]) for a, b in zip(whole, rows, strict=True)]
    assert 0 < sum(n > 0 for n in lost) < len(rows)
    facts = (f"{sum(n > 0 for n in lost)} of 16 ", "128 tokens", f" {sum(lost):,} tokens")
    assert all(fact in shortened_note(rows, "the cutoff", CUTOFF, "their ends") for fact in facts)
    assert shortened_note(whole, "the cutoff", 512, "their ends").startswith("no example")


def test_note_is_about_the_selected_rows(rows_of):
    short = rows_of().filter(lambda row: row["removed"] == 0, load_from_cache_file=False)
    assert shortened_note(short, "the cutoff", 512, "their ends").startswith("no example")


@pytest.mark.parametrize("kept", [0, 3, 0.5, -8])
def test_a_cache_that_was_cut_off_is_made_anew(rows_of, kept, capsys, tmp_path):
    rows = rows_of()[:]
    (file,) = tmp_path.rglob("rows-*.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert rows_of()[:] == rows and file.read_bytes() == content
    assert str(file) in capsys.readouterr().err


def test_the_task_of_a_file_is_given_once(tokenizers, tmp_path):
    bare = [{key: value for key, value in one.items() if key != "task_id"} for one in RECORDS[:1]]
    (tmp_path / "bare.jsonl").write_text(json.dumps(bare))
    arguments = tmp_path / "bare.jsonl", Encoder(tokenizers["gpt2"], "plain", CUTOFF, COMMONSENSE), tmp_path / "cache"
    assert training_rows(*arguments, task="boolq")[0]["task_id"] == COMMONSENSE["boolq"].id
    with pytest.raises(UserError, match="example 0 has no field 'task_id'"):
        training_rows(*arguments)


def test_the_seed_decides_which_examples_are_held_out(rows_of):
    rows = rows_of()
    first, again, other = ([*split(rows, 4, seed)[1]["input_ids"]] for seed in (1, 1, 2))
    assert first == again != other
