"""Downloads over a loopback server that cuts, lies and stalls: what ends under the final name is always right."""

import errno
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from mtl_lora import download
from mtl_lora.download import fetch, git_blob_sha1
from mtl_lora.errors import UserError

BODY = bytes(range(256)) * 1200  # several reads long
BLOB = hashlib.sha1(b"blob %d\0" % len(BODY) + BODY, usedforsecurity=False).hexdigest()


def answer(handler, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
    """Send ``body`` with a Content-Length that may promise more than is sent."""
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler):
    """A server that knows no Range."""
    answer(handler, 200, BODY)


def ranged(handler):
    """A server that honours Range, as GitHub does."""
    start = int((handler.headers["Range"] or "bytes=0-")[len("bytes=") : -1])
    if start >= len(BODY):
        answer(handler, 416, b"", Content_Range=f"bytes */{len(BODY)}")
    elif start:
        answer(handler, 206, BODY[start:], Content_Range=f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
    else:
        whole(handler)


def cut(handler):
    """Promise everything, send 100,000 bytes, close."""
    answer(handler, 200, BODY[:100_000], length=len(BODY))


def wrong(handler):
    answer(handler, 200, BODY[:-1] + b"?")


def status(code: int, **headers: str):
    return lambda handler: answer(handler, code, b"sorry", **headers)


@pytest.fixture
def server(monkeypatch):
    """A server whose ``replies`` answer one request each and the last one all further ones; it notes ``ranges``."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.ranges.append(self.headers["Range"])
            replies = self.server.replies
            (replies.pop(0) if len(replies) > 1 else replies[0])(self)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.replies, server.ranges = [ranged], []
    server.url = f"http://127.0.0.1:{server.server_port}/task/train.json"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Fetch the server's file to ``get.path`` without waiting; the pauses asked for are in ``get.pauses``."""

    def run(url=server.url, **expected):
        expected = expected or {"expected_git_blob_sha1": BLOB}
        return fetch(url, run.path, **expected, progress=False, sleep=run.pauses.append)

    run.path, run.pauses = tmp_path / "task" / "train.json", []
    run.part = tmp_path / "task" / "train.json.part"
    return run


def left_behind(get) -> list[str]:
    return sorted(path.name for path in get.path.parent.glob("*"))


def refused(get, **arguments) -> str:
    """The one sentence of a download that must fail."""
    with pytest.raises(UserError) as caught:
        get(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hash_is_that_of_git(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    assert git_blob_sha1(path) == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.parametrize(
    "expected", [{"expected_git_blob_sha1": BLOB}, {"expected_sha256": hashlib.sha256(BODY).hexdigest()}]
)
def test_file_is_fetched_once_and_then_left_alone(server, get, expected):
    assert get(**expected) is True
    assert get.path.read_bytes() == BODY and left_behind(get) == ["train.json"]
    assert get(**expected) is False
    assert server.ranges == [None]


def test_wrong_file_under_the_final_name_is_replaced(get):
    get.path.parent.mkdir()
    get.path.write_bytes(b"old")
    assert get() is True
    assert get.path.read_bytes() == BODY


def test_cut_connection_is_resumed_where_it_ended(server, get):
    server.replies = [cut, ranged]
    get()
    assert get.path.read_bytes() == BODY and left_behind(get) == ["train.json"]
    assert server.ranges == [None, "bytes=100000-"]
    assert get.pauses == [1.0]


def test_cut_chunked_answer_is_resumed(server, get):
    def chunked(handler):
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"c350\r\n" + BODY[:50_000] + b"\r\nffff\r\n" + BODY[50_000:50_010])
        handler.close_connection = True

    server.replies = [chunked, ranged]
    get()
    assert get.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=50010-"]


def test_part_of_an_earlier_run_is_resumed(server, get):
    server.replies = [cut]
    assert "in 5 attempts" in refused(get)
    assert left_behind(get) == ["train.json.part"]
    server.replies, server.ranges = [ranged], []
    get()
    assert get.path.read_bytes() == BODY
    assert server.ranges == ["bytes=100000-"]


def test_interruption_keeps_the_part_and_the_next_run_resumes(server, get, monkeypatch):
    reads = iter([BODY[:1000]])

    def interrupted(response, url):
        try:
            return next(reads)
        except StopIteration:
            raise KeyboardInterrupt from None

    with monkeypatch.context() as patch:
        patch.setattr(download, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert left_behind(get) == ["train.json.part"]
    get()
    assert get.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=1000-"]


def test_server_that_ignores_range_is_read_from_the_start(server, get):
    server.replies = [cut, whole]
    get()
    assert get.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-"]


def test_answer_that_covers_less_than_was_asked_for_is_continued(server, get):
    def short(handler):
        answer(handler, 206, BODY[100_000:200_000], Content_Range=f"bytes 100000-199999/{len(BODY)}")

    server.replies = [cut, short, ranged]
    get()
    assert get.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", "bytes=200000-"]


def test_answer_from_another_position_starts_over(server, get):
    def elsewhere(handler):
        answer(handler, 206, BODY[7:], Content_Range=f"bytes 7-{len(BODY) - 1}/{len(BODY)}")

    server.replies = [cut, elsewhere, ranged]
    get()
    assert get.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-", None]


@pytest.mark.parametrize(
    ("part", "ranges"),
    [
        (BODY, []),  # all there, stopped before the renaming
        (BODY + b"more", [f"bytes={len(BODY) + 4}-", None]),  # the server answers 416
        (b"?" * len(BODY), [f"bytes={len(BODY)}-", None]),
        (b"another version", ["bytes=15-", None]),  # shows only in the hash
        (b"", [None]),
    ],
    ids=["complete", "too long", "wrong to the end", "wrong", "empty"],
)
def test_any_part_left_by_others_ends_in_the_right_file(server, get, part, ranges):
    get.part.parent.mkdir()
    get.part.write_bytes(part)
    get()
    assert get.path.read_bytes() == BODY and left_behind(get) == ["train.json"]
    assert server.ranges == ranges


def test_wrong_bytes_are_fetched_once_more_and_then_refused_with_nothing_left(server, get):
    server.replies = [wrong]
    sentence = refused(get)
    assert server.url in sentence and BLOB in sentence
    assert server.ranges == [None, None]
    assert left_behind(get) == []


def test_wrong_bytes_once_are_forgiven(server, get):
    server.replies = [wrong, ranged]
    get()
    assert get.path.read_bytes() == BODY


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_refusal_is_one_sentence_with_the_address_and_no_retry(server, get, code):
    server.replies = [status(code)]
    sentence = refused(get)
    assert server.url in sentence and str(code) in sentence
    assert len(server.ranges) == 1 and get.pauses == [] and left_behind(get) == []


def test_busy_server_is_asked_again_after_the_pause_it_names(server, get):
    server.replies = [status(503, Retry_After="7"), status(503), status(429, Retry_After="86400"), ranged]
    get()
    assert get.path.read_bytes() == BODY
    assert get.pauses == [7.0, 2.0, 60.0]


def test_server_that_stays_busy_is_given_up(server, get):
    server.replies = [status(500)]
    assert server.url in refused(get)
    assert get.pauses == [1.0, 2.0, 4.0, 8.0] and left_behind(get) == []


def test_stalled_server_runs_into_the_timeout(server, get, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    done = threading.Event()

    def stalled(handler):
        cut(handler)
        handler.wfile.flush()
        done.wait(10)

    server.replies = [stalled, ranged]
    get()
    done.set()
    assert get.path.read_bytes() == BODY
    assert server.ranges == [None, "bytes=100000-"]


def test_nobody_listening_is_one_sentence(get):
    assert "in 5 attempts" in refused(get, url="http://127.0.0.1:9/train.json")


@pytest.mark.parametrize(
    "url",
    ["ftp://host/file", "file:///etc/hostname", "train.json", "https://", "http://host:port/", "http://a..b/"],
)
def test_only_web_addresses_are_followed(get, url):
    assert "no address to download from" in refused(get, url=url)


def test_redirect_keeps_the_range_but_never_leaves_the_web(server, get):
    server.replies = [cut, status(302, Location="/elsewhere"), ranged]
    get()
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-"]
    get.path.unlink()
    server.replies = [status(302, Location=get.path.parent.as_uri())]
    assert "302" in refused(get)
    server.replies = [status(302, Location="ftp://127.0.0.1/train.json")]
    assert "unknown url type: ftp" in refused(get)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_full_or_closed_disk_is_one_sentence(get, monkeypatch, code):
    def fail(*arguments):
        raise OSError(code, "no room")

    monkeypatch.setattr(download.os, "fsync", fail)
    assert "cannot be written (no room)" in refused(get)


def test_path_below_a_file_is_one_sentence(get):
    get.path.parent.write_text("a file")
    assert "cannot be written" in refused(get)


def test_fetch_needs_exactly_one_hash(tmp_path: Path):
    for expected in ({}, {"expected_git_blob_sha1": "0", "expected_sha256": "0"}):
        with pytest.raises(ValueError, match="exactly one"):
            fetch("http://127.0.0.1:9/", tmp_path / "file", **expected)
