"""What comes over the network, and only where a recipe asks for it: verified by check sum, and never run."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import get_console
from torch.hub import download_url_to_file

from tde_trainer.errors import UserError
from tde_trainer.tensor_file import one_line

_ONLY_TENSORS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch, for all that libraries load


def fetch_archive(url: str, sha256: str, folder: Path) -> None:
    """Fetch a tar file and unpack it in ``folder``, which nothing reaches before all of it is there and verified.

    Raises:
        UserError: it cannot be fetched, is another than the one of that sum, or reaches out of the folder.
    """
    if not hasattr(tarfile, "data_filter"):
        raise UserError("this Python unpacks no archive safely; wanted is 3.10.12, 3.11.4 or later")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".fetched-", dir=folder) as work:
            archive, unpacked = Path(work) / "archive", Path(work) / "unpacked"
            download_url_to_file(url, str(archive), hash_prefix=sha256, progress=get_console().is_terminal)
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")
            for file in [path for path in unpacked.rglob("*") if path.is_file()]:
                place = folder / file.relative_to(unpacked)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, place)
    except (OSError, RuntimeError, tarfile.TarError) as error:  # torch raises a RuntimeError of a wrong sum
        raise UserError(f"cannot fetch {url} to {folder}: {one_line(error)}") from error


@contextmanager
def published_weights(name: str) -> Iterator[None]:
    """Inside the block a library may fetch the weights of the network ``name``; of their files it gets tensors alone.

    Raises:
        UserError: they cannot be fetched, or are more than tensors.
    """
    before = os.environ.get(_ONLY_TENSORS)
    os.environ[_ONLY_TENSORS] = "1"
    try:
        yield
    except Exception as error:  # each library has its own
        raise UserError(f"model.pretrained=true: cannot load the weights of {name}: {one_line(error)}") from error
    finally:
        if before is None:
            del os.environ[_ONLY_TENSORS]
        else:
            os.environ[_ONLY_TENSORS] = before
