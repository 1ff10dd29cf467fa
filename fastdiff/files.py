"""Files that are whole or not there: atomic writing, JSON and safetensors.

A reader of a path written here sees the old content or the new, never a part of it: whatever happens to the
writer (an exception, a full disk, a kill), the path changes in one `os.replace` of data that is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# How a zip archive (torch.save since 1.6) and a bare pickle (protocols 2-5) begin. The length that begins a
# safetensors file can look the same, so this only explains a file that safetensors has refused.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `path` when the block ends without an error; else it is removed.

    The sibling lies in the same folder (made if need be) and keeps the suffix, by which many writers choose a
    format. The new file has the mode of the old one, or the one the umask gives. A symbolic link is followed,
    not replaced.

    Args:
        path: where the file is to be.
    Raises:
        ValueError: `path` is a folder, a device or a pipe; before the block runs.
        OSError: the folder cannot be made or written; before the block runs.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise ValueError(
            f"`path` must be a file or not exist yet, got {os.fspath(path)!r}, a folder or a device; "
            "name a file"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is cut so that the sibling's is legal wherever the target's is (255 bytes at most).
    temporary = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(8)}{target.suffix}")
    temporary.touch(mode=0o666, exist_ok=False)
    mode = (target if target.exists() else temporary).stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode & 0o7777)  # again: the block may have put a file of its own in place
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder and some network file systems cannot flush one; the replacement stands.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def to_json(obj: Any) -> str:
    """The text that `write_json` writes: indented, UTF-8, strict JSON.

    Raises:
        TypeError: `obj` holds what JSON does not know (a tensor, a path).
        ValueError: it holds NaN, an infinity, or itself.
    """
    try:
        return json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        remedy = "use dicts with string keys, lists, strings, finite numbers, booleans and None"
        raise type(error)(f"`obj` must be JSON data, got: {error}; {remedy}") from None


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` to `path` as JSON, atomically.

    Raises:
        TypeError, ValueError: `obj` is not JSON data; before anything is written.
        OSError: the disk is full or cannot be written; `path` is untouched.
    """
    text = to_json(obj)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both ValueErrors
        raise ValueError(
            f"`path` must be a JSON file, got {os.fspath(path)!r}, which cannot be read ({error}); "
            "copy or write it again"
        ) from None


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 digest of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors to `path` as safetensors, atomically and bit for bit.

    Args:
        tensors: any shapes, strides, dtypes and devices; views of one storage are stored apart.
        metadata: strings stored beside them.
    Raises:
        TypeError: a name or a piece of metadata is no string, or a value is no tensor.
        OSError: the disk is full or cannot be written; `path` is untouched.
    """
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """`save_tensors` straight to `path`, for a caller that is inside `atomic_path` already."""
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"`tensors` must map strings to tensors, got {name!r}: {type(tensor).__name__}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"`metadata` must map strings to strings, got {key!r}: {value!r}; use json.dumps")
    # Not `save_file`, which writes to a temporary of its own choice that a kill would leave behind.
    Path(path).write_bytes(save(_apart(tensors), metadata=dict(metadata or {})))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and each in a storage of its own, as safetensors demands."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def load_tensors(
    path: str | os.PathLike[str], device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata.

    Args:
        device: where the tensors are put. They own their memory: later changes to the file do not reach them.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, a pickle, of another format, or no file.
    """
    from safetensors import SafetensorError, safe_open

    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(
            f"`path` must be a safetensors file, got {os.fspath(path)!r}, a folder or a device; name a file"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # The clone leaves the file's mapping, which another program may cut short while it is in use.
            tensors = {key: file.get_tensor(key).clone().to(device) for key in file.keys()}  # noqa: SIM118
            return tensors, dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(_refusal(Path(path), error)) from None


def _refusal(path: Path, error: Exception) -> str:
    contract = f"`path` must be a safetensors file, got {str(path)!r}"
    with open(path, "rb") as file:
        if file.read(4).startswith(_PICKLE_STARTS):
            return (
                f"{contract}, which is a pickle and could run any code; read it with "
                "torch.load(..., weights_only=True) and write its tensors with safetensors.torch.save_file"
            )
    size = path.stat().st_size
    return f"{contract} ({size} bytes), which is truncated or no such file ({error}); copy or write it again"
