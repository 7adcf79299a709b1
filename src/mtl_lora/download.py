"""Verified downloads of single files from a public repository: whole under their final name, or not there at all."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from mtl_lora.config import Config
from mtl_lora.errors import UserError
from mtl_lora.files import give_usual_permissions, sha256

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

        store = pooch.Pooch(folder, "", registry={name: None}, urls={name: url}, retry_if_failed=ATTEMPTS - 1)
        try:
            (folder / name).unlink(missing_ok=True)  # other bytes than expected
            give_usual_permissions(store.fetch(name, downloader=transfer))
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
