"""Verified downloads from public repositories.

Single files are fetched by HTTP and appear under their final name only when complete. For sets of thousands of files,
git fetches folders of a commit and checks every file against the commit's id.
"""

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mtl_lora.config import Config
from mtl_lora.errors import UserError
from mtl_lora.files import give_usual_permissions, sha256, sha256_of

ATTEMPTS = 4
TIMEOUT_S = 30  # for the connection and for each read, not for the whole file
WORTH_A_RETRY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses


@dataclasses.dataclass(frozen=True)
class RemoteFile(Config):
    """One file of a repository's commit: its path there, its git blob id, and its sha256 if known."""

    path: str
    git_blob_sha1: str
    sha256: str | None = dataclasses.field(default=None, kw_only=True)

    def matches(self, path: str | Path) -> bool:
        """Return whether the file at ``path`` holds these bytes."""
        return sha256(path) == self.sha256 if self.sha256 else git_blob_sha1(path) == self.git_blob_sha1


def git_blob_sha1(path: str | Path) -> str:
    """Return git's id of a file's content: sha1 of ``blob <size>\\0`` and the bytes. Raises ``OSError``."""
    with Path(path).open("rb") as file:
        header = b"blob %d\0" % Path(path).stat().st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def github_raw(repository: str, commit: str) -> str:
    """Return the address below which GitHub serves the files of a commit."""
    return f"https://raw.githubusercontent.com/{repository}/{commit}"


def fetch_all(base_url: str, folder: Path, files: Mapping[str, RemoteFile]) -> None:
    """Fetch the files that are missing or differ below ``folder``.

    base_url: the address below which the files' own paths lie. files: {path below ``folder``: file}.
    Each file is written under a temporary name and renamed once its hash is right; a broken transfer or wrong bytes are
    tried ``ATTEMPTS`` times. Prints the number of files fetched. Raises ``UserError`` for the first file that fails and
    keeps those fetched before it.
    """
    if not re.match(r"https?://[^/]", base_url):
        raise UserError(f"{base_url!r} is not an address to download from; it must begin with https:// or http://")
    if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise UserError(f"the file {outside[0]} would be written outside {folder}; correct its path in the manifest")
    missing = [name for name, file in files.items() if not ((folder / name).is_file() and file.matches(folder / name))]
    for name in missing:
        import pooch
        import requests

        file, url = files[name], f"{base_url.rstrip('/')}/{files[name].path}"

        def transfer(url: str, output: str, store: pooch.Pooch, file: RemoteFile = file) -> None:
            try:
                pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, timeout=TIMEOUT_S)(url, output, store)
            except requests.RequestException as error:
                refused = error.response is not None and error.response.status_code not in WORTH_A_RETRY
                if refused or isinstance(error, ValueError | requests.exceptions.SSLError):
                    raise RuntimeError(error) from None  # pooch does not retry after this one
                raise
            if not file.matches(output):
                raise ValueError(f"other bytes than expected, git blob {git_blob_sha1(output)}")

        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # In a temporary folder: an existing file with other bytes stays until the new one is complete.
            with tempfile.TemporaryDirectory(prefix=".fetch.", suffix=".partial", dir=folder) as place:
                store = pooch.Pooch(place, "", registry={name: None}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
                fetched = Path(store.fetch(name, downloader=transfer))
                give_usual_permissions(fetched)
                fetched.replace(folder / name)
        except (ValueError, RuntimeError, requests.RequestException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{url} cannot be downloaded ({reason}); run the same command again, which keeps the files already "
                "downloaded, or pass files that you have with --source DIR"
            ) from None
        except OSError as error:
            raise UserError(f"{folder / name} cannot be written ({error.strerror or error})") from None
    print(f"{len(missing)} files downloaded to {folder}, {len(files) - len(missing)} were already there")


@dataclasses.dataclass(frozen=True)
class RemoteFolder(Config):
    """The files of a repository's commit that match ``paths``, patterns that pathlib and git both understand.

    root: where the repository's root lies below a source or download folder. count: how many files match. sha256: the
    hash of a line ``<git blob id> <path>`` for each file, in order of the paths, so one manifest entry covers thousands
    of files. (The archive of a commit would be a single file, but its bytes change from one day to the next.)
    """

    repository: str
    commit: str
    root: str
    paths: list[str]
    count: int
    sha256: str
    megabytes: int

    def found(self, folder: Path) -> list[str]:
        """Return the matching paths below ``folder / root``, in order."""
        root = folder / self.root
        return sorted({path.relative_to(root).as_posix() for pattern in self.paths for path in root.glob(pattern)})

    def check(self, folder: Path) -> None:
        """Raise ``UserError`` unless the matching files below ``folder`` are those of the commit."""
        found = self.found(folder)
        where = f"{folder / self.root} is not {self.repository} at {self.commit[:12]}"
        if len(found) != self.count:
            raise UserError(f"{where}: {len(found):,} files match {', '.join(self.paths)}, not {self.count:,}")
        lines = "".join(f"{git_blob_sha1(folder / self.root / path)} {path}\n" for path in found)
        if (digest := sha256_of(lines.encode())) != self.sha256:
            raise UserError(f"{where}: some of its {self.count:,} files have other bytes (sha256 {digest[:12]}...)")

    def fetch(self, folder: Path, base_url: str) -> None:
        """Fetch the files with git to ``folder / root``, unless they are already there. Raises ``UserError``.

        base_url: the address that the repository's name is appended to, such as https://github.com. Files that do not
        match are not transferred if the server can leave them out.
        """
        try:
            return self.check(folder)
        except UserError:
            pass
        url, root = f"{base_url.rstrip('/')}/{self.repository}", folder / self.root
        root.mkdir(parents=True, exist_ok=True)
        print(f"fetching {url} (about {self.megabytes} MB) to {root}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix=".git.", suffix=".partial", dir=folder) as store:
            variables = {"GIT_DIR": store, "GIT_WORK_TREE": str(root.resolve()), "GIT_TERMINAL_PROMPT": "0"}
            for command in (
                ["init", "--quiet"],
                ["config", "core.autocrlf", "false"],
                ["config", "remote.origin.url", url],
                ["sparse-checkout", "set", "--no-cone", *(f"/{path}" for path in self.paths)],
                ["fetch", "--quiet", "--depth", "1", "--filter", "blob:none", "origin", self.commit],
                ["checkout", "--quiet", "--force", self.commit],
            ):
                try:
                    done = subprocess.run(
                        ["git", *command], env=os.environ | variables, cwd=root, capture_output=True, text=True
                    )
                except FileNotFoundError:
                    raise UserError("downloading this data set needs git; install it, or pass --source DIR") from None
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                    raise UserError(
                        f"{url} cannot be fetched (git {command[0]}: {reason:.200}); run the same command again, or "
                        "pass files that you have with --source DIR"
                    )
        self.check(folder)
