"""Files served on loopback, as a repository's raw files are served."""

import functools
import http.server
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest


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
def run(prepare, world, capsys):
    """Run a test file's ``prepare`` script on its ``world``, with the flags that name it; returns what it printed."""

    def command(*arguments, source=True):
        where = ["--source", world.source] if source else []
        prepare.main([str(argument) for argument in (*where, *world.flags, *arguments)])
        return capsys.readouterr().out

    return command
