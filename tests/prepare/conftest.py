"""Files served on loopback, as a repository's raw files are served."""

import functools
import http.server
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pooch.core
import pytest

from mtl_lora import cli


@pytest.fixture
def serve(monkeypatch) -> Callable[[Path], SimpleNamespace]:
    """Serve folders on loopback: ``serve(folder)`` has ``url`` and ``asked``, the paths that were asked for."""
    monkeypatch.setenv("no_proxy", "*")
    running = []

    def start(folder: Path) -> SimpleNamespace:
        asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                super().do_GET()

            def log_message(self, *arguments):
                pass

        handler = functools.partial(Handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}/", asked=asked)

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def run(world, capsys):
    """Prepare a test file's ``world`` with the flags that describe it; returns what was printed."""

    def command(*arguments, source=True):
        flags = {**world.flags, **({"--source": world.source} if source else {})}
        given = [str(argument) for argument in arguments]
        given += [f"{name}={value}" for name, value in flags.items() if name not in given]
        cli.main(["prepare", *world.set, *given])
        return capsys.readouterr().out

    return command


@pytest.fixture
def refused(run, world, capsys):
    """Prepare, which must fail with one sentence and write nothing; returns the sentence."""

    def command(*arguments, **options):
        with pytest.raises(SystemExit) as caught:
            run(*arguments, **options)
        captured = capsys.readouterr()
        sentences = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert caught.value.code == 2 and len(sentences) == 1 and captured.err.endswith(sentences[0] + "\n")
        assert [path for path in world.output.rglob("*") if path.is_file()] == []
        return sentences[0]

    return command


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Failed downloads are tried again at once."""
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)
