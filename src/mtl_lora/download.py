"""Verified, resumable downloads over http and https, with the standard library alone.

A transfer goes to ``<name>.part`` beside the file and gets the final name once its hash is right, so a file under
its final name is always whole. A broken transfer leaves its ``.part``, from which the next one goes on.
"""

import contextlib
import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from mtl_lora.errors import UserError
from mtl_lora.files import sha256

CHUNK_BYTES = 1 << 16
TIMEOUT_S = 30  # for the connection and for each read, not for the whole file
ATTEMPTS = 5
LONGEST_WAIT_S = 60.0
STATUSES_WORTH_A_RETRY = {408, 416, 425, 429, 500, 502, 503, 504}


class _Broken(Exception):
    """The transfer broke in a way that waiting may mend; ``wait_s`` is what the server asked for, 0 if nothing."""

    def __init__(self, reason: str, status: int = 0, wait_s: float = 0.0):
        super().__init__(reason)
        self.status = status
        self.wait_s = wait_s


def git_blob_sha1(path: str | Path) -> str:
    """The id git gives a file's bytes: sha1 of ``blob <size>\\0`` and the bytes; raises ``OSError``."""
    with Path(path).open("rb") as file:
        header = b"blob %d\0" % os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def fetch(
    url: str,
    path: str | Path,
    *,
    expected_git_blob_sha1: str = "",
    expected_sha256: str = "",
    progress: bool = True,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Put the file at ``url`` to ``path``, unless it is there already; True if something was transferred.

    Exactly one expected hash is given. Broken transfers are resumed up to ``ATTEMPTS`` times with growing pauses
    (``sleep``, seconds); bytes with another hash are dropped and fetched from the start once more. ``progress`` shows
    a bar on a terminal if tqdm is installed.

    Raises ``UserError``: no http(s) address, refused or broken for good, another hash, or ``path`` not writable.
    """
    if bool(expected_git_blob_sha1) == bool(expected_sha256):
        raise ValueError("fetch needs exactly one of expected_git_blob_sha1 and expected_sha256")
    digest, kind = (git_blob_sha1, "git blob") if expected_git_blob_sha1 else (sha256, "sha256")
    expected = expected_git_blob_sha1 or expected_sha256
    if not re.match(r"https?://[^/]", url):
        raise UserError(f"{url!r} is no address to download from; it must begin with https:// or http://")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        if path.is_file() and digest(path) == expected:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # the first round may have gone on from the .part of some other version
            if not part.is_file() or digest(part) != expected:
                _transfer_with_retries(url, part, progress, sleep)
            found = digest(part)
            if found == expected:
                os.replace(part, path)
                return True
            part.unlink()
    except OSError as error:
        raise UserError(f"{error.filename or part} cannot be written ({error.strerror or error})") from None
    raise UserError(f"{url} holds other bytes than expected ({kind} {found} instead of {expected}); nothing was kept")


def fetch_all(base_url: str, files: Mapping[Path, tuple[str, str]]) -> int:
    """Fetch what is not there yet of ``{file: (path below base_url, git blob id)}``; returns how many were fetched.

    Raises ``UserError`` for the first that cannot be had; those before it stay.
    """
    fetched = 0
    for path, (name, git_blob) in files.items():
        try:
            fetched += fetch(f"{base_url.rstrip('/')}/{name}", path, expected_git_blob_sha1=git_blob)
        except UserError as error:
            raise UserError(f"{error}; files had in another way are taken with --source DIR") from None
    return fetched


def github_raw(repository: str, commit: str) -> str:
    """The address below which GitHub serves the files of a commit."""
    return f"https://raw.githubusercontent.com/{repository}/{commit}"


def _transfer_with_retries(url: str, part: Path, progress: bool, sleep: Callable[[float], None]) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _transfer(url, part, progress)
        except _Broken as error:
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{url} could not be downloaded in {ATTEMPTS} attempts ({error}); "
                    "run the same command again later, it goes on where this one stopped"
                ) from None
            wait_s = min(error.wait_s or 2.0 ** (attempt - 1), LONGEST_WAIT_S)
            print(f"{url}: {error}; attempt {attempt + 1} of {ATTEMPTS} in {wait_s:.0f} s", file=sys.stderr)
            sleep(wait_s)


def _transfer(url: str, part: Path, progress: bool) -> None:
    """Write ``part`` from ``url``, going on after the bytes it has; raises ``_Broken``, ``UserError``, ``OSError``."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "mtl-lora"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - fetch lets nothing but http(s) pass
    with contextlib.ExitStack() as stack:
        try:
            with _network_errors(url):
                response = stack.enter_context(_opener().open(request, timeout=TIMEOUT_S))
        except _Broken as error:
            if error.status != 416 or not start:
                raise
            part.unlink()  # it is as long as the file or longer, and fetch found its hash wrong
            return _transfer(url, part, progress)
        first, total = _span(response)
        # A server that ignores Range sends the whole file: first is 0, and what was there is written over. One that
        # sends yet another piece than the one asked for is found out by the hash.
        bar = stack.enter_context(_progress_bar(f"{part.parent.name}/{part.stem}", first, total, progress))
        file = stack.enter_context(part.open("ab" if first else "wb"))
        while chunk := _read(response, url):
            file.write(chunk)
            if bar is not None:
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
        if total is not None and file.tell() < total:  # http.client takes a cut connection for the end of the file
            raise _Broken(f"the connection ended after {file.tell():,} of {total:,} bytes")


def _span(response) -> tuple[int, int | None]:
    """First byte of the answer within the file, and the file's length where the server says it."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    first = int(match[1]) if response.status == 206 and match else 0
    if first and match[2] != "*":
        return first, int(match[2])
    length = response.headers.get("Content-Length", "")
    return first, first + int(length) if length.isdecimal() else None


def _read(response, url: str) -> bytes:
    with _network_errors(url):
        return response.read1(CHUNK_BYTES)


@contextlib.contextmanager
def _network_errors(url: str):
    """Sort what can happen on the network: ``_Broken`` where waiting may help, ``UserError`` where it cannot."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in STATUSES_WORTH_A_RETRY:
            wait = error.headers.get("Retry-After", "")
            wait_s = float(wait) if wait.isdecimal() else 0.0
            raise _Broken(f"the server answered {error.code} {error.reason}", error.code, wait_s) from None
        raise UserError(f"{url} cannot be downloaded: the server answered {error.code} {error.reason}") from None
    except (http.client.InvalidURL, UnicodeError) as error:
        raise UserError(f"{url} is no address to download from: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # URLError wraps what happened below it
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(f"{url} cannot be downloaded: its certificate is not trusted ({reason})") from None
        raise _Broken(str(reason) or type(reason).__name__) from None


def _opener() -> urllib.request.OpenerDirector:
    """urllib without its file, data and ftp handlers, so that no redirect leads there; proxies come from the shell."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _progress_bar(label: str, first: int, total: int | None, wanted: bool):
    """A context manager that yields a tqdm bar, or None where tqdm is absent."""
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext()
    # disable=None: no bar where stderr is a file
    return tqdm(desc=label, initial=first, total=total, unit="B", unit_scale=True, disable=None if wanted else True)
