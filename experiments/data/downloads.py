"""Files with a known address and checksum: taken from disk where they are, downloaded where not."""

import contextlib
import errno
from dataclasses import dataclass
from pathlib import Path

import pooch
import requests

from experiments.core.errors import ExperimentError


@dataclass(frozen=True)
class KnownFile:
    """A published file of a corpus. `checksum` is `algorithm:hexdigest`; `url` is None where it is not downloaded."""

    corpus: str
    name: str
    checksum: str
    url: str | None = None

    def find(self, root: Path) -> Path | None:
        """The file at `root/corpus/name` or `root/name`, or None.

        Raises ExperimentError where a file of that name has another checksum.
        """
        for path in (self.home(root), root / self.name):
            if path.is_file():
                self._verify(path)
                return path
        return None

    def fetch(self, root: Path) -> Path:
        """The file on disk, downloaded to `root/corpus/name` if it is not there yet.

        Raises ExperimentError where there is no folder `root` but the user's cache, where the download fails, and where
        the file is not the known one; no partial file is left.
        """
        return self.find(root) or self._download(root)

    def home(self, root: Path) -> Path:
        """Where a download puts the file."""
        return root / self.corpus / self.name

    def _verify(self, path: Path) -> None:
        algorithm, expected = self.checksum.split(":")
        try:
            got = pooch.file_hash(str(path), alg=algorithm)
        except OSError as error:
            raise ExperimentError(f"{path}: cannot be read: {error.strerror}.") from error
        if got != expected:
            raise ExperimentError(
                f"{path}: this is not {self.corpus}'s {self.name}: {algorithm} is {got}, expected {expected}. "
                "Remove it or put the published file in its place; give a text of your own by --data.path."
            )

    def _download(self, root: Path) -> Path:
        home = self.home(root)
        if self.url is None:
            raise ExperimentError(f"{home}: no such file, and it has no address to download it from.")
        if not root.is_dir() and root != Path(pooch.os_cache("multint")):  # the default alone is made
            raise ExperimentError(
                f"--data.root: there is no folder {root}, into which {self.name} is to be downloaded. Make it "
                "first, or correct the path."
            )
        # Not streamed: pooch leaves the connection of a refused request open, and no file here is above 200 MB.
        downloader = pooch.HTTPDownloader(chunk_size=1 << 16, stream=False)
        try:
            # pooch writes to a temporary file, renames it only when the checksum is right, and removes it otherwise.
            pooch.retrieve(self.url, self.checksum, home.name, home.parent, downloader=downloader)
        except (OSError, ValueError) as error:
            with contextlib.suppress(OSError):  # its folder is of use only with a file in it
                home.parent.rmdir()
            raise ExperimentError(
                f"{self.name}: the download from {self.url} failed: {_reason(error, home.parent)}. "
                f"Try again, or put the file at {home} by hand ({self.checksum}), "
                "or say with --data.root in which folder it lies."
            ) from error
        return home


def _reason(error: OSError | ValueError, folder: Path) -> str:
    match error:
        case requests.HTTPError(response=requests.Response() as response):
            return f"the server answered {response.status_code} {response.reason}"
        case requests.exceptions.ChunkedEncodingError():
            return f"the connection broke off before the end ({error})"
        case requests.RequestException():
            return f"the server cannot be reached ({error})"
        case OSError(errno=errno.ENOSPC):
            return f"no space left on the disk of {folder}"
        case OSError():
            return f"cannot write to {folder} ({error.strerror or error})"
    return f"what the server sent has the wrong checksum ({error})"
