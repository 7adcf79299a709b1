"""Whole files or none, and one sentence for a file that cannot be read or written."""

import errno
import json
import os
import platform
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mtl_lora import artifacts, files
from mtl_lora.errors import EXIT_CODE, UserError, user_errors_to_exit_code


def everything(folder) -> dict[str, bytes]:
    """Each file below a folder, hidden ones too, with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- writing ----


def test_file_takes_its_name_only_when_the_block_ends_well(tmp_path):
    with files.atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"new")
        assert not (tmp_path / "a.bin").exists()
        assert temporary.parent == tmp_path, "a rename is whole only within one file system"
    assert everything(tmp_path) == {"a.bin": b"new"}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, UserError, SystemExit])
@pytest.mark.parametrize("before", [None, b"old"], ids=["new file", "replaced file"])
def test_failure_leaves_what_was_there_and_nothing_else(tmp_path, failure, before):
    if before is not None:
        (tmp_path / "a.bin").write_bytes(before)
    with pytest.raises(failure), files.atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half of the ne")
        raise failure("stopped")
    assert everything(tmp_path) == ({} if before is None else {"a.bin": before})


def test_value_that_is_no_json_leaves_the_old_file(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert everything(tmp_path) == {"a.json": b'{\n  "a": 1\n}\n'}


def test_folders_above_the_file_are_made(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "c.txt", "text")
    assert everything(tmp_path) == {"a/b/c.txt": b"text"}


def test_text_is_written_as_it_is(tmp_path):
    files.write_text(tmp_path / "a.txt", "é ☃\r\n\nend")
    assert (tmp_path / "a.txt").read_bytes() == "é ☃\r\n\nend".encode()


def test_half_a_character_of_json_stays_as_it_was_spelled(tmp_path):
    value = json.loads('{"note": "\\ud800 \\ud83d\\ude00 \\\\ud800"}')
    files.write_text(tmp_path / "a.jsonl", files.json_lines([value]))
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8")) == value


def test_written_file_has_the_usual_permissions(tmp_path):
    files.write_text(tmp_path / "a.txt", "text")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~files.UMASK


def test_threads_that_write_leave_the_umask_of_the_process_alone(tmp_path):
    before = os.umask(0o022)
    os.umask(before)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: files.write_json(tmp_path / f"{n}.json", n), range(200)))
    after = os.umask(before)
    os.umask(after)
    assert after == before == files.UMASK


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="it is a folder or a device"), files.atomic_path(path):
            pass
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and Path("/dev/null").is_char_device()


def test_the_root_can_be_claimed_as_any_folder():
    with files.claimed("/"):
        pass


def test_path_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        files.write_text(tmp_path / "file" / "a.txt", "text")
    assert str(tmp_path / "file" / "a.txt") in str(caught.value) and "\n" not in str(caught.value)
    assert everything(tmp_path) == {"file": b""}


# ---- folders ----


def whole(output, **options):
    """The context of an output folder that holds a.json and b-*.json."""
    return files.atomic_directory(output, ["a.json", "b-*.json"], **{"overwrite": False, **options})


def test_folder_appears_when_the_block_ends_well_with_the_usual_permissions(tmp_path):
    with whole(tmp_path / "x" / "out") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.json").write_text("1")
        (folder / "part").chmod(0o700)
        assert folder.parent == tmp_path / "x" and not (tmp_path / "x" / "out").exists()
    assert everything(tmp_path) == {"x/out/part/a.json": b"1"}
    for path in (tmp_path / "x" / "out", tmp_path / "x" / "out" / "part"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~files.UMASK


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, UserError, OSError, SafetensorError])
@pytest.mark.parametrize("before", [False, True], ids=["new folder", "replaced folder"])
def test_failure_leaves_the_old_folder_and_nothing_else(tmp_path, failure, before):
    if before:
        files.write_text(tmp_path / "out" / "a.json", "old")
    expected = UserError if failure in (OSError, SafetensorError) else failure
    with pytest.raises(expected), whole(tmp_path / "out", overwrite=True) as folder:
        (folder / "a.json").write_text("half of the ne")
        raise failure("no space left")
    assert everything(tmp_path) == ({"out/a.json": b"old"} if before else {})


def test_earlier_output_is_replaced_as_a_whole_when_asked_for(tmp_path):
    for name in ("a.json", "b-1.json"):
        files.write_text(tmp_path / "out" / name, "old")
    with pytest.raises(UserError, match="--overwrite"), whole(tmp_path / "out"):
        pass
    with whole(tmp_path / "out", overwrite=True) as folder:
        (folder / "b-2.json").write_text("new")
    assert everything(tmp_path) == {"out/b-2.json": b"new"}


@pytest.mark.parametrize(
    ("left", "options"),
    [
        ("out/notes.txt", {}),  # written by someone else
        ("out/part/a.json", {}),  # a folder where files are expected
        ("out/part/notes.txt", {"nested": True}),
        ("out", {}),  # a file in place of the folder
    ],
)
def test_anything_that_is_not_an_earlier_output_is_left_alone(tmp_path, left, options):
    files.write_text(tmp_path / left, "theirs")
    with pytest.raises(UserError, match=str(tmp_path / "out")), whole(tmp_path / "out", overwrite=True, **options):
        raise AssertionError("nothing may be written")
    assert everything(tmp_path) == {left: b"theirs"}


@pytest.mark.parametrize("read", ["out", "out/part"])
def test_folder_that_holds_an_input_is_not_replaced(tmp_path, read):
    files.write_text(tmp_path / "out" / "part" / "a.json", "old")
    with pytest.raises(UserError), whole(tmp_path / "out", overwrite=True, nested=True, inputs=[tmp_path / read]):
        raise AssertionError("nothing may be written")
    assert everything(tmp_path) == {"out/part/a.json": b"old"}


def test_folder_is_replaced_where_the_system_cannot_swap_two(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    test_earlier_output_is_replaced_as_a_whole_when_asked_for(tmp_path)


# ---- one command at a time ----

# The fork is as a worker of a data loader, which lives on for seconds after a kill of the command.
HOLDS = """
import os, sys, time
from mtl_lora import files
with files.claimed(sys.argv[1]):
    if not os.fork():
        print(1, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed tmp_path/out and has a fork."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"1\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_output_is_claimed_by_one_process_and_free_when_that_is_killed(tmp_path, holder):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for same in (tmp_path / "out", tmp_path / "link", tmp_path / "x" / ".." / "out"):
        found = rf"^{tmp_path}/out is in use by another command \(process {holder.pid} on "
        with pytest.raises(UserError, match=found), files.claimed(same):
            raise AssertionError("it has another owner")
    with files.claimed(tmp_path / "other"):
        holder.kill()
        holder.wait()
    with files.claimed(tmp_path / "out"), pytest.raises(UserError), files.claimed(tmp_path / "out"):
        raise AssertionError("also of this process only one")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_link_in_place_of_a_lock_is_not_written_through(tmp_path):
    (tmp_path / "own.txt").write_text("precious")
    (tmp_path / ".out.lock").symlink_to(tmp_path / "own.txt")
    with pytest.raises(UserError, match="cannot be written"), files.claimed(tmp_path / "out"):
        raise AssertionError("the lock is a link")
    assert (tmp_path / "own.txt").read_text() == "precious"


def test_claim_that_waits_gets_the_output_afterwards(tmp_path, holder):
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: time.sleep(0.2) or holder.kill())
        with files.claimed(tmp_path / "out", wait=True):
            assert time.monotonic() - began > 0.15


def test_claim_leaves_no_folder_that_it_made_and_removes_what_a_kill_left(tmp_path):
    with files.claimed(tmp_path / "a" / "b" / "out"):
        assert everything(tmp_path) == {"a/b/.out.lock": f"{os.getpid()} on {platform.node()}".encode()}
    assert list(tmp_path.iterdir()) == []
    mine = [".out.abcdefgh.partial/model", ".out.12345678.partial"]
    theirs = [".out.json.abcdefgh.partial", ".other.abcdefgh.partial", "out.partial"]
    mine += ["out/.run.json.abcdefgh.partial"]
    theirs += ["out/.answers.abcdefgh.partial", "out/.answers.lock", "out/part/.a.abcdefgh.partial", "out/a.json"]
    for name in (*mine, *theirs):
        files.write_text(tmp_path / name, "half")
    with files.claimed(tmp_path / "out"):
        assert everything(tmp_path).keys() == {*theirs, ".out.lock"}
    for name in (".x.abcdefgh.old/moved_aside", ".y.abcdefgh.old/former", "y/new"):
        files.write_text(tmp_path / name, "whole")
    for name, content in (("x", "moved_aside"), ("y", "new")):
        with files.claimed(tmp_path / name):
            assert everything(tmp_path / name) == {content: b"whole"}
    assert not list(tmp_path.glob(".*.old"))


@pytest.mark.parametrize("folder", ["a mount point", "below one that cannot be written"])
def test_folder_itself_is_locked_where_no_file_can_lie_beside_it(tmp_path, monkeypatch, folder):
    output, opens = tmp_path / "out", os.open

    def refused(path, *options):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opens(path, *options)

    if folder == "a mount point":
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(output))
    else:
        monkeypatch.setattr(os, "open", refused)
        with pytest.raises(UserError, match="Permission denied"), files.claimed(output):
            raise AssertionError("there is nothing to lock")
    output.mkdir()
    with files.claimed(output), pytest.raises(UserError, match="in use"), files.claimed(output):
        raise AssertionError("it has another owner")
    assert list(tmp_path.rglob("*")) == [output]


def test_without_locks_a_note_says_so(tmp_path, monkeypatch, capsys):
    import fcntl

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".out.abcdefgh.partial").touch()  # for all that is known, of a command that still runs
    with files.claimed(tmp_path / "out"):
        assert str(tmp_path / "out") in capsys.readouterr().err
    assert everything(tmp_path).keys() == {".out.abcdefgh.partial"}


def test_stop_between_two_renames_leaves_no_file_that_names_the_whole(tmp_path, monkeypatch):
    names, replace = ["whole", "a", "b"], files.Path.replace
    files.write_all({tmp_path / name: b"old" for name in names})

    def stopped(path, target):
        if target.name == "a":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(files.Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_all({tmp_path / name: b"new" for name in names})
    assert everything(tmp_path) == {"a": b"old", "b": b"new"}


def test_room_on_the_disk_is_held_or_refused(tmp_path, monkeypatch):
    free = os.statvfs(tmp_path)
    with files.reserved(tmp_path, 1 << 20) as room:
        assert os.fstat(room.fileno()).st_blocks * 512 >= 1 << 20 and everything(tmp_path) == {}
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("it fills the disk before it fails"))
    with pytest.raises(UserError, match=rf"{tmp_path} lacks room"):
        files.reserved(tmp_path, free.f_blocks * free.f_frsize * 2)


# ---- reading ----


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, "é ☃ \u2028"]}, [], "text", 0])
def test_json_survives_a_trip_through_a_file(tmp_path, value):
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json", "the file") == value
    assert (tmp_path / "a.json").read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "is not JSON: Expecting value"),
        (b'{"a": 1', "is not JSON: Expecting ',' delimiter: line 1 column 8"),
        (b'"\xff"', "is not UTF-8 text in line 1"),
        (b"[" * 100_000, "is not JSON: maximum recursion depth"),
        (b"1" * 5000, "is not JSON: Exceeds the limit"),
    ],
    ids=["missing", "empty", "cut off", "not UTF-8", "endless nesting", "endless number"],
)
def test_json_that_cannot_be_read_names_what_and_where(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"^the settings {tmp_path}/a\.json {message}") as caught:
        files.read_json(tmp_path / "a.json", "the settings")
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_a_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        files.read_json(tmp_path, "the settings")


def test_hash_of_a_file_that_cannot_be_read_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        files.sha256(tmp_path)


def test_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "a").write_bytes(b"abd")
    assert not files.sha256(tmp_path / "a").startswith("ba7816bf")


# ---- how a command line tells of it ----


def test_mistake_ends_a_command_with_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        raise UserError("the flag --a is wrong")
    assert stopped.value.code == EXIT_CODE == 2
    assert capsys.readouterr() == ("", "error: the flag --a is wrong\n")


def test_a_process_other_than_the_first_says_which_it_is(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        raise UserError("the flag --a is wrong")
    assert stopped.value.code == EXIT_CODE
    assert capsys.readouterr() == ("", "error on local rank 1: the flag --a is wrong\n")


def test_stopping_a_command_is_not_a_crash(capsys):
    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped by the user\n"


def test_sigterm_unwinds_and_exits_as_a_shell_says_it():
    before, unwound = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            unwound.append(True)
    assert stopped.value.code == 143 and unwound and signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def interruptible():
    """A shell lets what it starts in the background ignore SIGINT, these tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_native_code_turns_into_an_error_of_its_own_ends_as_the_signal(number, code):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ValueError("could not determine the shape") from None
    assert stopped.value.code == code and signal.getsignal(number) is before
    with pytest.raises(ValueError, match="of its own"), user_errors_to_exit_code():
        raise ValueError("of its own")


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_inside_a_destructor_ends_the_command_too(capsys, number):
    class Dies:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        Dies()
        time.sleep(5)
    assert stopped.value.code == 128 + number and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x/log"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_full_disk_is_one_sentence(capsys, error):
    with pytest.raises(SystemExit) as stopped, user_errors_to_exit_code():
        raise error
    printed = capsys.readouterr().err
    assert stopped.value.code == EXIT_CODE and "is full" in printed and printed.count("\n") == 1


def test_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug") as caught, user_errors_to_exit_code():
        raise ValueError("a bug")
    assert type(caught.value) is ValueError


# ---- the files of a training and of an evaluation ----


def test_checkpoints_are_in_the_order_of_their_steps_and_only_complete_ones_count(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-2", "checkpoint-best", "checkpoint-8a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / artifacts.RESUME_STATE).touch()
    (tmp_path / "checkpoint-11").mkdir()
    assert [path.name for path in artifacts.checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 9, 10, 100)]


def test_an_evaluation_is_removed_whole_and_what_lies_beside_it_stays(tmp_path):
    kept = {"run.json", "mtl_lora.safetensors", "train_log.jsonl", "maps/depth/1.npy"}
    gone = {"results.json", "settings.json", "sheet.png", "pictures.html", "predictions/boolq.jsonl"}
    for name in kept | gone:
        files.write_text(tmp_path / name, "")
    artifacts.remove_evaluation(tmp_path)
    assert everything(tmp_path).keys() == kept
