"""Downloads over a loopback server that cuts and lies: what is under the final name is always right."""

import hashlib
import http.server
import stat
import threading

import pooch.core
import pytest
from shared import git_blob

from mtl_lora import download
from mtl_lora.download import RemoteFile, fetch_all, git_blob_sha1
from mtl_lora.errors import UserError
from mtl_lora.files import UMASK

BODY = bytes(range(256)) * 1200  # several reads long
BLOB = git_blob(BODY)
KNOWN = {"git blob": RemoteFile("task/train.json", BLOB)}
KNOWN["sha256"] = RemoteFile("task/train.json", BLOB, sha256=hashlib.sha256(BODY).hexdigest())


def reply(status: int, body: bytes, length: int | None = None, **headers: str):
    """An answer with ``body`` and a Content-Length that may promise more than is sent."""

    def send(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return send


WHOLE, WRONG = reply(200, BODY), reply(200, BODY[:-1] + b"?")
CUT = reply(200, BODY[:100_000], length=len(BODY))


@pytest.fixture
def server(monkeypatch):
    """A server whose ``replies`` answer one request each, and the last one all further ones; ``asked`` counts them."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            replies = self.server.replies
            (replies.pop(0) if len(replies) > 1 else replies[0])(self)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.replies, server.asked, server.url = [WHOLE], 0, f"http://127.0.0.1:{server.server_port}/data/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(server, tmp_path, monkeypatch, capsys):
    """Fetch the server's file to ``get.path``, 1 if it was; pauses between attempts are noted instead of waited."""

    def run(url=None, file=KNOWN["git blob"]) -> int:
        fetch_all(url or server.url, tmp_path, {"task/train.json": file})
        return int(capsys.readouterr().out.split()[0])

    run.path, run.pauses = tmp_path / "task" / "train.json", []
    monkeypatch.setattr(pooch.core.time, "sleep", run.pauses.append)
    return run


def left_behind(get) -> list[str]:
    return sorted(path.name for path in get.path.parent.glob("*"))


def refused(get, *facts: str, **arguments) -> None:
    """A download that must fail with one sentence and leave nothing."""
    with pytest.raises(UserError) as caught:
        get(**arguments)
    text = str(caught.value)
    assert "\n" not in text and [fact for fact in facts if fact not in text] == [], text
    assert left_behind(get) == []


def test_hash_is_that_of_git(tmp_path):
    (tmp_path / "file").write_bytes(b"hello\n")
    assert git_blob_sha1(tmp_path / "file") == "ce013625030ba8dba906f756967f9e9ca394464a"


@pytest.mark.parametrize("known", KNOWN)
def test_file_is_fetched_once_and_then_left_alone(server, get, known):
    assert get(file=KNOWN[known]) == 1
    assert get.path.read_bytes() == BODY and left_behind(get) == ["train.json"]
    assert stat.S_IMODE(get.path.stat().st_mode) == 0o666 & ~UMASK
    assert get(file=KNOWN[known]) == 0 and server.asked == 1


@pytest.mark.parametrize("known", KNOWN)
def test_other_bytes_under_the_final_name_are_replaced(get, known):
    get.path.parent.mkdir()
    get.path.write_bytes(BODY[:-1])
    assert get(file=KNOWN[known]) == 1 and get.path.read_bytes() == BODY


def test_other_bytes_stay_where_nothing_can_be_fetched(server, get):
    get.path.parent.mkdir()
    get.path.write_bytes(b"one's own")
    server.replies = [reply(404, b"sorry")]
    with pytest.raises(UserError):
        get()
    assert get.path.read_bytes() == b"one's own" and left_behind(get) == ["train.json"]
    assert [path.name for path in get.path.parents[1].iterdir()] == ["task"]


@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("broken", [CUT, WRONG, reply(503, b"busy")], ids=["truncated", "wrong", "busy"])
def test_broken_transfer_is_tried_again(server, get, broken, known):
    server.replies = [broken, broken, WHOLE]
    assert get(file=KNOWN[known]) == 1
    assert get.path.read_bytes() == BODY and left_behind(get) == ["train.json"]
    assert server.asked == 3 and len(get.pauses) == 2


@pytest.mark.parametrize(
    ("always", "facts"),
    [(CUT, ["--source"]), (WRONG, ["other bytes", git_blob(BODY[:-1] + b"?")]), (reply(500, b""), ["500"])],
    ids=["truncated", "wrong", "failing"],
)
def test_what_stays_broken_is_one_sentence_and_leaves_nothing(server, get, always, facts):
    server.replies = [always]
    refused(get, f"{server.url}task/train.json", *facts)
    assert server.asked == download.ATTEMPTS


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_refusal_is_one_sentence_without_another_attempt(server, get, code):
    server.replies = [reply(code, b"sorry")]
    refused(get, f"{server.url}task/train.json", str(code))
    assert server.asked == 1 and get.pauses == []


def test_stalled_server_runs_into_the_timeout(server, get, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    done = threading.Event()

    def stalled(handler):
        CUT(handler)
        handler.wfile.flush()
        done.wait(10)

    server.replies = [stalled, WHOLE]
    get()
    done.set()
    assert get.path.read_bytes() == BODY


@pytest.mark.parametrize("name", ["../out.json", "a/../../out.json", "/out.json"])
def test_a_file_outside_the_folder_is_refused(server, tmp_path, name):
    with pytest.raises(UserError, match=f"{name} would be written outside"):
        fetch_all(server.url, tmp_path / "in", {name: RemoteFile("task/train.json", BLOB)})
    assert not server.asked
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    fetch_all(server.url, tmp_path, {"data/train.json": RemoteFile("task/train.json", BLOB)})
    assert (tmp_path / "disk" / "train.json").read_bytes() == BODY, "a link that the user made may lead elsewhere"


def test_nobody_listening_is_one_sentence(get):
    refused(get, "http://127.0.0.1:9/task/train.json", url="http://127.0.0.1:9")


@pytest.mark.parametrize("url", ["ftp://host/", "file:///etc", "train.json", "https://", "http://host:port/"])
def test_only_web_addresses_are_followed(server, get, url):
    refused(get, url.rstrip("/"), url=url)
    server.replies = [reply(302, b"", Location=get.path.parent.as_uri())]
    refused(get, "file:")
    assert get.pauses == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interruption_leaves_nothing_half_written(get, monkeypatch, interruption):
    def stop(self, url, output, store):
        with open(output, "wb") as opened:
            opened.write(BODY[:1000])
        raise interruption

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", stop)
    with pytest.raises((KeyboardInterrupt, UserError)) as caught:
        get()
    assert left_behind(get) == [] and (caught.type is KeyboardInterrupt or "No space left" in str(caught.value))


def test_folder_that_cannot_be_written_is_one_sentence(get):
    get.path.parent.write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        get()
