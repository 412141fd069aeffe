"""Files: written whole or not at all, and read so that a damaged one ends in one line."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from envs.contents import COUNT, misfit

with contextlib.suppress(ImportError):  # Windows has no such locks
    import fcntl

LONGEST_MESSAGE = 2000  # characters


class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong and what to do.

    It is one line that a terminal can show, whatever a file put into it."""

    def __init__(self, message: str):
        line = " ".join("".join(c if c.isprintable() else " " for c in message).split())
        half = LONGEST_MESSAGE // 2
        super().__init__(line if len(line) <= LONGEST_MESSAGE else f"{line[: half - 5]} ... {line[-half:]}")


class WriteError(UserError):
    """A file could not be written, as on a full disk."""


REMEDIES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "its folder was removed: put it back, or start anew"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "what was there is intact; make its folder writable"),
}


def unwritable(path: Path, error: OSError) -> WriteError:
    reason = error.strerror or " ".join(str(error).split())
    remedy = REMEDIES.get(error.errno, "what was there is intact; free some space")
    return WriteError(f"{path} could not be written ({reason}); {remedy}")


@contextlib.contextmanager
def replacing(path: Path, ending: str = ".tmp") -> Iterator[Path]:
    """The name under which to write a file that then takes the place of `path`: a crash leaves the old one or the new.

    Raises:
        WriteError: it could not be written.
    """
    temporary = path.with_name(f".{path.name}{ending}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the target, flush to the disk, then rename."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def append(path: Path, text: str | bytes) -> None:
    """Add to a log."""
    try:
        with open(path, "ab") as file:
            file.write(text.encode() if isinstance(text, str) else text)
    except OSError as error:
        raise unwritable(path, error) from error


def lock(path: Path, busy: str) -> IO:
    """An open file that no other process can have until it is closed or this process ends, however it ends.

    Raises:
        UserError: another one has it, which is what `busy` says; or it cannot be made.
    """
    try:
        file = open(path, "wb")  # noqa: SIM115 (stays open)
    except OSError as error:
        raise unwritable(path, error) from error
    taken = False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        taken = True
    except (OSError, NameError):  # a file system, or a system, without locks: nobody is kept out
        pass
    if taken or not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):  # just now removed
        file.close()
        raise UserError(busy)
    return file


def csv_text(rows: list[dict], header: bool) -> str:
    """Rows of a CSV file."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [])
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def write_json(path: Path, content: dict) -> None:
    write_whole(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def read_json(path: Path) -> dict:
    """A JSON file that holds one object.

    Raises:
        UserError: it is missing or holds something else.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a JSON file such as a run's config.json")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read (nested too deep); mend it or use another") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); mend it or use another") from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: must hold one JSON object, such as {{"learning_rate": 0.001}}')
    return content


def require(content: Any, wanted: Any, source: str | Path, advice: str) -> None:
    """Raises UserError unless what a file holds is as wanted; see contents.misfit."""
    if wrong := misfit(content, wanted):
        raise UserError(f"{source}: {wrong}; {advice}")


def save(path: Path, content: dict) -> None:
    """A dict of tensors, arrays and plain values, in torch's format."""
    buffer = io.BytesIO()
    torch.save(plain(content), buffer)
    write_whole(path, buffer.getvalue())


def plain(x: Any) -> Any:
    """With tensors for numpy's arrays and Python numbers for its scalars, so that it loads with weights_only=True."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(plain(value) for value in x)
    if isinstance(x, np.ndarray):
        return torch.as_tensor(x)
    return x.item() if isinstance(x, np.generic) else x


def sha256(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_pt(path: Path, advice: str) -> dict:
    """What `save` wrote.

    Raises:
        UserError: the file is missing or damaged, or holds something else than a dict.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give a .pt file, or a run directory that holds one")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {**content}
    except Exception as error:  # what torch.load raises has no common base
        raise UserError(f"{path}: empty, damaged or not a file of this project; {advice}") from error


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a .jsonl log, each of a step; a torn or damaged line is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            rows += [row] if not misfit(row, {"step": COUNT}) else []
    return rows


def read_progress(path: Path) -> list[dict]:
    """The rows of a progress.csv as strings: the step, and numbers or nothing; a torn or damaged row is left out."""

    def sound(row: dict) -> bool:
        if None in row or None in row.values():
            return False
        with contextlib.suppress(KeyError, ValueError):
            return int(row["step"]) >= 0 and bool([float(cell or "nan") for cell in row.values()])
        return False

    if not path.exists():
        return []
    rows = csv.DictReader(path.read_text(errors="replace").splitlines())
    try:
        return [row for row in rows if sound(row)]
    except csv.Error as error:
        raise UserError(f"{path}: damaged ({error}); restore it, or remove it") from None
