"""Downloads: asked for, verified before they are unpacked, and all there or not at all."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tde_trainer.data.cifar import cifar10_lt
from tde_trainer.errors import UserError
from tde_trainer.fetch import fetch_archive
from tde_trainer.schema import DataConfig
from torchvision.datasets import CIFAR10
from trainer_tools import cifar_files, cifar_labels


class Handler(SimpleHTTPRequestHandler):
    """Silent; what is called half it sends half of."""

    def log_message(self, *arguments: object) -> None:
        pass

    def copyfile(self, source: io.BufferedReader, outputfile: io.BufferedIOBase) -> None:  # type: ignore[override]
        content = source.read()
        outputfile.write(content[: len(content) // 2] if "half" in self.path else content)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address at which its files are."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def archive(file: Path, members: dict[str, bytes], link: tuple[str, str] | None = None) -> str:
    """A gzipped tar file; its SHA-256."""
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            tar.addfile(member)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_an_archive_of_the_right_sum_is_unpacked(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    digest = archive(folder / "a.tar.gz", {"set/one": b"1", "set/deep/two": b"2"})
    root = tmp_path / "root"
    (root / "set").mkdir(parents=True)
    (root / "set/one").write_text("damaged")
    (root / "set/other").write_text("the user's")
    fetch_archive(f"{address}/a.tar.gz", digest, root)
    found = {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert found == {"set/one": "1", "set/deep/two": "2", "set/other": "the user's"}


@pytest.mark.parametrize("damage", ["another", "half", "none"])
def test_what_is_not_whole_leaves_nothing(damage: str, served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    digest = archive(folder / f"{damage}.tar.gz", {"set/one": b"1" * 1000})
    if damage == "another":
        archive(folder / "another.tar.gz", {"set/one": b"2" * 1000})
    if damage == "none":
        (folder / "none.tar.gz").unlink()
    root, url = tmp_path / "root", f"{address}/{damage}.tar.gz"
    with pytest.raises(UserError) as error:
        fetch_archive(url, digest, root)
    assert str(error.value).startswith(f"cannot fetch {url} to {root}: ") and "\n" not in str(error.value)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("where", ["../evil", "/tmp/evil-of-tde", "link"])
def test_an_archive_stays_in_its_folder(where: str, served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    members = {"set/one": b"1"} if where == "link" else {"set/one": b"1", where: b"evil"}
    digest = archive(folder / "a.tar.gz", members, ("set/link", "../../../etc") if where == "link" else None)
    root = tmp_path / "root"
    if where == "/tmp/evil-of-tde":  # unpacked beneath the folder
        fetch_archive(f"{address}/a.tar.gz", digest, root)
        assert (root / "tmp/evil-of-tde").is_file() and not Path(where).exists()
        return
    with pytest.raises(UserError, match="cannot fetch"):
        fetch_archive(f"{address}/a.tar.gz", digest, root)
    assert list(root.iterdir()) == [] and not (tmp_path / "evil").exists()


class TestCifar:
    """From the archive to the images."""

    @pytest.fixture
    def config(self, served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
        folder, address = served
        files = cifar_files(tmp_path / "files", CIFAR10, cifar_labels(10, 20), cifar_labels(10, 20), monkeypatch)
        members = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        self.sha256 = archive(folder / "cifar.tar.gz", members)
        monkeypatch.setattr(CIFAR10, "url", f"{address}/cifar.tar.gz")
        return DataConfig("cifar10_lt", str(tmp_path / "root"), n_max=20, ratio=2, val_per_class=5)

    def test_it_is_fetched_where_that_is_asked_for(self, config: DataConfig) -> None:
        cifar = replace(cifar10_lt, sha256=self.sha256)
        with pytest.raises(UserError, match=r"no intact copy of CIFAR10 .*data\.download=true fetches it"):
            cifar(config, 0)
        assert not Path(config.root).exists()
        assert cifar(replace(config, download=True), 0).class_counts.tolist()[0] == 20
        assert cifar(config, 0).class_counts.tolist()[0] == 20

    def test_another_archive_is_refused(self, config: DataConfig) -> None:
        with pytest.raises(UserError, match="invalid hash value"):
            cifar10_lt(replace(config, download=True), 0)
        assert list(Path(config.root).iterdir()) == []
