"""Downloads: a file arrives whole and checked or not at all, and a file on disk is taken instead."""

import errno
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pooch
import pytest
import torch

from experiments.core.errors import ExperimentError
from experiments.data import TextData, WordData
from experiments.data.downloads import KnownFile
from experiments.data.text import corpora, word_sources

CONTENT = b"the quick brown fox " * 10_000


class Server(ThreadingHTTPServer):
    """Serves `content[path]`, counts requests; `/short/…` breaks off half way."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.requests = 0

    def known(self, name: str, content: bytes = CONTENT, path: str = "/", checksum: str | None = None) -> KnownFile:
        self.content[path + name] = content
        checksum = checksum or f"sha256:{hashlib.sha256(content).hexdigest()}"
        return KnownFile("corpus", name, checksum, f"http://127.0.0.1:{self.server_port}{path}{name}")


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        content = self.server.content.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if self.path.startswith("/short/") else content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def zipped(contents: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_a_download_is_whole_and_kept(server: Server, tmp_path: Path) -> None:
    file = server.known("file.txt")
    path = file.fetch(tmp_path)
    assert (path, path.read_bytes()) == (tmp_path / "corpus" / "file.txt", CONTENT)
    assert file.fetch(tmp_path) == path
    assert (server.requests, files_below(tmp_path)) == (1, [path])


def test_no_folder_is_made_but_the_users_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = server.known("file.txt")
    with pytest.raises(ExperimentError, match=r"--data\.root: there is no folder"):
        file.fetch(tmp_path / "mistyped")
    assert (server.requests, list(tmp_path.iterdir())) == (0, [])
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    assert file.fetch(tmp_path / "multint").read_bytes() == CONTENT


@pytest.mark.parametrize("place", ["corpus/file.txt", "file.txt"])
def test_a_file_on_disk_is_taken(server: Server, tmp_path: Path, place: str) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CONTENT)
    assert server.known("file.txt").fetch(tmp_path) == path
    assert server.requests == 0


def test_another_file_of_that_name_is_refused_and_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(b"mine")
    with pytest.raises(ExperimentError, match=r"this is not corpus's file.txt: sha256 is .*, expected .*--data.path"):
        server.known("file.txt").fetch(tmp_path)
    assert (path.read_bytes(), server.requests) == (b"mine", 0)


def refused(file: KnownFile, root: Path, message: str) -> None:
    """The download fails with a message that says what, why and the remedy, and leaves nothing."""
    with pytest.raises(ExperimentError, match=message) as error:
        file.fetch(root)
    for part in (file.name, file.url, str(file.home(root)), file.checksum, "--data.root"):
        assert str(part) in str(error.value)
    assert list(root.iterdir()) == []


def test_a_wrong_checksum_is_refused(server: Server, tmp_path: Path) -> None:
    refused(server.known("file.txt", checksum="sha256:" + "0" * 64), tmp_path, "has the wrong checksum")


def test_an_interrupted_download_is_refused(server: Server, tmp_path: Path) -> None:
    refused(server.known("file.txt", path="/short/"), tmp_path, "the connection broke off before the end")


def test_a_missing_file_is_refused(server: Server, tmp_path: Path) -> None:
    file = server.known("file.txt")
    server.content.clear()
    refused(file, tmp_path, "the server answered 404")


def test_an_unreachable_server_is_refused(tmp_path: Path) -> None:
    with Server() as closed:
        file = closed.known("file.txt")
    refused(file, tmp_path, "the server cannot be reached")


def test_a_full_disk_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: pooch.HTTPDownloader, url: str, output_file: str, pooch: object) -> None:
        Path(output_file).write_bytes(CONTENT[:1000])
        raise OSError(errno.ENOSPC, "No space left on device", output_file)

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", full)
    refused(server.known("file.txt"), tmp_path, f"no space left on the disk of {tmp_path}")


def test_a_root_that_is_no_folder_is_refused(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("")
    with pytest.raises(ExperimentError, match="there is no folder"):
        server.known("file.txt").fetch(root)


def test_a_download_that_is_stopped_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: pooch.HTTPDownloader, url: str, output_file: str, pooch: object) -> None:
        Path(output_file).write_bytes(CONTENT[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(pooch.HTTPDownloader, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        server.known("file.txt").fetch(tmp_path)
    assert files_below(tmp_path) == []


# Whole corpora


@pytest.fixture
def hutter(server: Server, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """text8 and enwik8 at a thousandth of their size, served locally."""
    content = {"text8": b"abcd efgh " * 1000, "enwik8": "<é€>\n".encode() * 1000}
    table = {
        name: (
            KnownFile("corpus", name, f"md5:{hashlib.md5(text).hexdigest()}"),
            server.known(f"{name}.zip", zipped({name: text})),
        )
        for name, text in content.items()
    }
    monkeypatch.setattr(corpora, "HUTTER", table)
    monkeypatch.setattr(corpora, "HUTTER_HELD_OUT", 500)
    return content


@pytest.mark.parametrize("on_disk", ["nothing", "plain", "archive"])
@pytest.mark.parametrize(("corpus", "unit"), [("text8", "characters"), ("enwik8", "bytes")])
def test_hutter_texts_are_split_by_count(
    server: Server, hutter: dict[str, bytes], tmp_path: Path, corpus: str, unit: str, on_disk: str
) -> None:
    whole = hutter[corpus]
    if on_disk == "plain":
        (tmp_path / corpus).write_bytes(whole)
    if on_disk == "archive":
        (tmp_path / f"{corpus}.zip").write_bytes(zipped({corpus: whole}))
    data = TextData(corpus, root=str(tmp_path), batch_size=4, length=10)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    assert server.requests == (on_disk == "nothing")
    assert len(files_below(tmp_path)) == 1
    assert data.vocabulary.unit == unit
    for loader, text in ((data.val_dataloader(), whole[-1000:-500]), (data.test_dataloader(), whole[-500:])):
        ids = torch.cat([batch.targets[:, 0] for batch in loader])
        torch.testing.assert_close(ids, data.vocabulary.encode(text if unit == "bytes" else text.decode())[1:])
    inputs = torch.cat([batch.inputs for batch in data.train_dataloader()])
    assert inputs.shape == ((len(whole) - 1001) // 4, 4)


def test_penn_treebank_is_downloaded_and_rendered(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = b" no it was n't \n <unk> N \n" * 200
    monkeypatch.setattr(corpora, "PTB", tuple(server.known(f"{name}.txt", words) for name in ("a", "b", "c")))
    splits = corpora.load("ptb", tmp_path)
    assert set(splits) == {"no it was n't\n<unk> N\n" * 200}
    assert server.requests == 3


@pytest.mark.parametrize("on_disk", ["nothing", "plain", "archive", "plain by itself", "archive by itself"])
def test_wikitext_is_read_from_its_archive_or_from_what_is_in_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: str
) -> None:
    texts = {"train": b" \n = a <unk> = \n" * 100, "valid": b" a b \n" * 10, "test": b" a \n \n" * 10}
    archive = zipped({f"wikitext-2/wiki.{split}.tokens": text for split, text in texts.items()})
    known = server.known("wikitext-2-v1.zip", archive)
    monkeypatch.setattr(word_sources, "WIKITEXT", {"wikitext-2": known})
    monkeypatch.setattr(word_sources, "TOKENS", {"wikitext-2": {"train": 600, "valid": 30, "test": 30}})
    folder = tmp_path if on_disk.endswith("itself") else tmp_path / "wikitext-2"
    folder.mkdir(exist_ok=True)
    if on_disk.startswith("plain"):
        for split, text in texts.items():
            (folder / f"wiki.{split}.tokens").write_bytes(text)
    if on_disk == "archive":
        folder = tmp_path / "corpus"  # as `known` has it
        folder.mkdir()
    if on_disk.startswith("archive"):
        (folder / "wikitext-2-v1.zip").write_bytes(archive)
    for _ in range(2):
        data = WordData("wikitext-2", root=str(tmp_path), batch_size=4, length=10)
        data.prepare_data()
        data.setup()
        assert data.vocabulary.decode(data._streams["test"][1:5]) == "a\n\na"
        assert [data.vocabulary.words[i] for i in data._streams["valid"][1:4]] == ["a", "<unk>", "<eos>"]
    assert server.requests == (on_disk == "nothing")
    assert len(list(tmp_path.rglob("words-*"))) == 1


def test_other_texts_in_the_place_of_wikitext_are_refused(tmp_path: Path) -> None:
    for split in word_sources.SPLITS:
        (tmp_path / f"wiki.{split}.tokens").write_text("<unk> a b\n" * 100)
    with pytest.raises(ExperimentError, match=r"not the published wikitext-103: .* 400 / 400 / 400 .*103,227,021"):
        WordData("wikitext-103", root=str(tmp_path)).setup()


def test_words_of_penn_treebank_are_downloaded(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = b" no it was n't \n <unk> N \n" * 200
    monkeypatch.setattr(word_sources, "PTB", tuple(server.known(f"{name}.txt", words) for name in ("a", "b", "c")))
    monkeypatch.setattr(word_sources, "TOKENS", {"ptb-words": dict.fromkeys(word_sources.SPLITS, 1600)})
    data = WordData(root=str(tmp_path), batch_size=4, length=10)
    data.prepare_data()
    data.setup()
    assert server.requests == 3
    assert data.vocabulary.decode(data._streams["valid"][1:9]) == "no it wasn't\n<unk> N\n"
