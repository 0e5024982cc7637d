"""Corpora from the web: a download continues where it broke off, and is used only if its checksum is right."""

import hashlib
import http.client
import os
import queue
import re
import threading
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from beartype import beartype
from tqdm import tqdm

from palm_rlhf.data.corpora.cached_folder import DISK_FULL, locked, room_for
from palm_rlhf.model.files import replacing, sync

CHUNK = 1 << 18  # bytes


class DownloadError(OSError):
    """The error of a corpus that could not be downloaded, or is not the expected one."""


@beartype
@dataclass(frozen=True)
class Archive:
    """A corpus in a zip file on the web.

    Args:
        name: The file in the zip.
        url: Where the zip is.
        sha256: The checksum of the unpacked file.
        splits: The bytes of its train, valid and test splits, in this order in the file.
    """

    name: str
    url: str
    sha256: str
    splits: tuple[int, int, int]

    @property
    def num_bytes(self) -> int:
        """The size of the unpacked file in bytes."""
        return sum(self.splits)


ENWIK8 = Archive(
    name="enwik8",
    url="http://mattmahoney.net/dc/enwik8.zip",
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    splits=(90_000_000, 5_000_000, 5_000_000),
)


def cached(archive: Archive, folder: Path) -> Path | None:
    """Return the path of the unpacked corpus in `folder`, or None if it is not there.

    Raises DownloadError if the file has another size.
    """
    path = folder / archive.name
    if not path.exists():
        return None
    size = path.stat().st_size
    if size != archive.num_bytes:
        raise DownloadError(
            f"{path} has {size:,} bytes, expected {archive.num_bytes:,}: it is not "
            f"{archive.name}; delete it to download it again"
        )
    return path


@beartype
def fetch(archive: Archive, folder: Path, timeout: float = 10.0) -> Path:
    """Download and unpack `archive` into `folder` unless it is there, and return the path of the unpacked file.

    A broken transfer is continued in this call as long as every attempt brings new bytes, else in the next call. Raises
    DownloadError if the corpus cannot be had.

    Args:
        archive: The corpus.
        folder: Where to put it.
        timeout: The seconds to wait for the first answer, and then for each piece.
    """
    with locked(folder / archive.name):
        path = cached(archive, folder)
        if path is None:
            part = folder / f"{archive.name}.zip.part"
            # A complete zip is there already if the disk was too full to unpack it.
            if not (part.exists() and zipfile.is_zipfile(part)):
                _download(archive, part, timeout)
            path = _unpack(archive, part)
    return path


def _download(archive: Archive, part: Path, timeout: float) -> None:
    complete = False
    while not complete:
        before = _size(part)
        reason: BaseException | str = "the transfer ended early"
        try:
            complete = _transfer(archive, part, timeout)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            reason = error
        have = _size(part)
        if not complete and have <= before:
            kept = f"; {have:,} bytes are kept in {part}, and the next call goes on from there" if have else ""
            raise DownloadError(
                f"{archive.name} could not be downloaded from {archive.url} ({reason}){kept}: try again, or put the "
                f"unpacked file at {part.parent / archive.name}"
            ) from (reason if isinstance(reason, BaseException) else None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _transfer(archive: Archive, part: Path, timeout: float) -> bool:
    """Make one request for the bytes that `part` lacks; return whether the download is complete."""
    have = _size(part)
    request = urllib.request.Request(archive.url, headers={"User-Agent": "palm-rlhf"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = _open(request, timeout)
    except urllib.error.HTTPError as error:
        if not (have and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise
        part.unlink()  # longer than the file on the server, so not a part of it
        return _transfer(archive, part, timeout)
    with response:
        # A server that does not know ranges answers 200 with the whole file.
        resumed = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = int(resumed.group(1)) if resumed and response.status == http.client.PARTIAL_CONTENT else 0
        if start > have:
            raise DownloadError(f"the server sent bytes from {start:,} on, expected from {have:,} on")
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        bar = tqdm(desc=f"downloading {archive.name}", total=total, initial=start, unit="B", unit_scale=True)
        with bar, room_for((total or start) - start, part.parent), open(part, "ab") as file:
            file.seek(file.truncate(start))
            while chunk := response.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            return total is None or file.tell() == total


def _open(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse:
    # The timeout of `urlopen` holds for each address of a host, and not for the name server: a thread bounds both.
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=timeout))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _unpack(archive: Archive, part: Path) -> Path:
    path = part.parent / archive.name
    with room_for(archive.num_bytes, path.parent), replacing(path) as temporary:
        got = _unpacked_sha256(archive, part, temporary)
        if got != archive.sha256:
            part.unlink()
            raise DownloadError(
                f"{archive.name} from {archive.url} has sha256 {got}, expected {archive.sha256}; nothing of it was "
                "kept: try again, or name a mirror"
            )
    sync(path.parent)
    part.unlink()
    return path


def _unpacked_sha256(archive: Archive, part: Path, temporary: Path) -> str:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(part) as files, files.open(archive.name) as source, open(temporary, "wb") as target:
            # One byte more than expected is enough to know, whatever the zip claims to hold.
            while target.tell() <= archive.num_bytes and (chunk := source.read(CHUNK)):
                digest.update(chunk)
                target.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        part.unlink()
        raise DownloadError(
            f"the download from {archive.url} is not a zip file with a sound {archive.name} in it ({error}); nothing "
            "of it was kept: try again, or name a mirror"
        ) from error
    return digest.hexdigest()
