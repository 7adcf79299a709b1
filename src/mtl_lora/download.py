"""Verified downloads from public repositories: single files, whole under their final name or not there at all; and, of
sets of thousands of files, a commit's folders by git, which checks every file against the commit's id.
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
    """One file of a repository's commit: its path there, its git blob id, and its sha256 where that is known."""

    path: str
    git_blob_sha1: str
    sha256: str | None = dataclasses.field(default=None, kw_only=True)

    def matches(self, path: str | Path) -> bool:
        """Whether the file at ``path`` holds these bytes."""
        return sha256(path) == self.sha256 if self.sha256 else git_blob_sha1(path) == self.git_blob_sha1


def git_blob_sha1(path: str | Path) -> str:
    """The id that git gives a file's bytes: sha1 of ``blob <size>\\0`` and the bytes; raises ``OSError``."""
    with Path(path).open("rb") as file:
        header = b"blob %d\0" % Path(path).stat().st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def github_raw(repository: str, commit: str) -> str:
    """The address below which GitHub serves the files of a commit."""
    return f"https://raw.githubusercontent.com/{repository}/{commit}"


def fetch_all(base_url: str, folder: Path, files: Mapping[str, RemoteFile]) -> None:
    """Fetch what is missing or differs of ``{path below folder: file}`` from below ``base_url``.

    Each file goes to a temporary name and gets its own once its hash is right. Broken transfers and other bytes are
    tried ``ATTEMPTS`` times. Prints the number of files fetched; raises ``UserError`` for the first that fails, with
    those before it in their place.
    """
    if not re.match(r"https?://[^/]", base_url):
        raise UserError(f"{base_url!r} is not an address to download from; it must begin with https:// or http://")
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
                    raise RuntimeError(error) from None  # after which pooch does not try again
                raise
            if not file.matches(output):
                raise ValueError(f"other bytes than expected, git blob {git_blob_sha1(output)}")

        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # Beside it, for a file of other bytes stays until its successor is there.
            with tempfile.TemporaryDirectory(prefix=".fetch.", suffix=".partial", dir=folder) as place:
                store = pooch.Pooch(place, "", registry={name: None}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
                fetched = Path(store.fetch(name, downloader=transfer))
                give_usual_permissions(fetched)
                fetched.replace(folder / name)
        except (ValueError, RuntimeError, requests.RequestException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{url} cannot be downloaded ({reason}); run the same command again, which keeps the files that are "
                "there, or pass files that you have with --source DIR"
            ) from None
        except OSError as error:
            raise UserError(f"{folder / name} cannot be written ({error.strerror or error})") from None
    print(f"{len(missing)} files downloaded to {folder}, {len(files) - len(missing)} were there")


def check_source(folder: Path, files: Mapping[str, RemoteFile]) -> None:
    """Raise ``UserError`` that names every raw file below ``folder`` that is missing or has other bytes."""
    problems = []
    for name, raw in files.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif (blob := git_blob_sha1(folder / name)) != raw.git_blob_sha1:
            problems.append(f"{name} has other bytes (git blob {blob} instead of {raw.git_blob_sha1})")
    if problems:
        raise UserError(f"{folder} is not the source: {'; '.join(problems)}; without --source the files are downloaded")


@dataclasses.dataclass(frozen=True)
class RemoteFolder(Config):
    """The files of a repository's commit that match ``paths`` (of pathlib's and git's patterns what both know).

    root: where the repository's own root lies below a source or download folder. count and sha256: how many files
    match, and the hash of a line ``<git blob id> <path>`` for each, in order of the paths: one line of a manifest for
    thousands of files. An archive of a commit would be one file, but its bytes differ from one day to the next.
    """

    repository: str
    commit: str
    root: str
    paths: list[str]
    count: int
    sha256: str
    megabytes: int

    def found(self, folder: Path) -> list[str]:
        """The paths below ``folder / root`` that match, in order."""
        root = folder / self.root
        return sorted({path.relative_to(root).as_posix() for pattern in self.paths for path in root.glob(pattern)})

    def check(self, folder: Path) -> None:
        """Raise ``UserError`` unless the files below ``folder`` are those of the commit."""
        found = self.found(folder)
        where = f"{folder / self.root} is not {self.repository} at {self.commit[:12]}"
        if len(found) != self.count:
            raise UserError(f"{where}: {len(found):,} files match {', '.join(self.paths)}, not {self.count:,}")
        lines = "".join(f"{git_blob_sha1(folder / self.root / path)} {path}\n" for path in found)
        if (digest := sha256_of(lines.encode())) != self.sha256:
            raise UserError(f"{where}: some of its {self.count:,} files have other bytes (sha256 {digest[:12]}...)")

    def fetch(self, folder: Path, base_url: str) -> None:
        """Have git fetch the files to ``folder / root``, unless they are there; raises ``UserError``.

        base_url: where the repository lies below, as https://github.com. Files that do not match are not transferred
        where the server can leave them out.
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
                    raise UserError("downloads of this set need git; install it, or pass --source DIR") from None
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                    raise UserError(
                        f"{url} cannot be fetched (git {command[0]}: {reason:.200}); run the same command again, or "
                        "pass files that you have with --source DIR"
                    )
        self.check(folder)
