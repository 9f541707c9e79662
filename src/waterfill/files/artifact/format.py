"""The words of the packed format (docs/format.md §2, §3): buffers, tensors, names, digests, JSON.

A broken rule raises `FormatError`; whoever knows the file turns it into an `ArtifactError` (`refusing`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from waterfill.base.dtypes import ITEM_BYTES
from waterfill.base.errors import ArtifactError
from waterfill.base.reading import UnfitFileError, open_regular
from waterfill.codecs import LOSSLESS

FORMAT_VERSION = 1
RAW = "raw"  # the codec of a tensor that is kept as it was

MAX_DIMENSIONS = 8
MAX_INTEGER = 2**63 - 1
MAX_NUMBER_CHARACTERS = 32
MAX_NAME_CHARACTERS = 1000
MAX_TENSORS = 1 << 15  # of a shard
MAX_VALUES = 64 * MAX_TENSORS  # of a JSON text

NO_DIGEST = "0" * 16
_DIGEST = re.compile(r"[0-9a-f]{16}")
_BUFFER_KEY = re.compile(r"[a-z0-9_]+")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,254}")
_CHUNK_BYTES = 1 << 20


def is_packed(codec: str) -> bool:
    """Whether a tensor of that codec is multiplied from its codes; one that keeps every bit, coded or not, is not."""
    return codec not in (RAW, LOSSLESS)


class FormatError(ValueError):
    """A broken rule of the format: the middle of a sentence that begins with a file's name and ends with a remedy."""

    def __init__(self, fault: str, remedy: str | None = None) -> None:
        super().__init__(fault)
        self.remedy = remedy


@dataclass(frozen=True)
class Buffer:
    """One safetensors entry: `dtype` is one of ITEM_BYTES, `shape` counts elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Length of the buffer in the shard."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model and the buffers that hold it.

    `shape` and `dtype` are those of the decoded tensor, `[out_features, in_features]` for a packed matrix. With codec
    `raw` there is one buffer, of the tensor's own name; a packed tensor has buffers called `<name>.<key>`.
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    dtype: str
    buffers: tuple[Buffer, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all its buffers."""
        return sum(buffer.size_bytes for buffer in self.buffers)

    @property
    def packed(self) -> bool:
        """Whether it is multiplied from its codes; what keeps every bit, raw or losslessly coded, is not."""
        return is_packed(self.codec)

    @property
    def keys(self) -> tuple[str, ...]:
        """What distinguishes the buffers: `scales`, `codes`, …; the empty string for the one buffer of a raw tensor."""
        return tuple(buffer.name.removeprefix(self.name).removeprefix(".") for buffer in self.buffers)


def quote(text: str) -> str:
    """A name as messages show it: quoted, and cut short where only an attacker would make it long."""
    return repr(text if len(text) <= 200 else text[:200] + "…")


def buffer_name(tensor: str, key: str) -> str:
    """Name of the entry that holds buffer `key` of `tensor`."""
    return f"{tensor}.{key}" if key else tensor


def guard_of(tensors: Sequence[TensorSpec]) -> Buffer | None:
    """The entry of no bytes that a shard of coded tensors ends with; None if all are raw.

    It is called like a parameter of the model, of a shape that no parameter has: a program that does not know the
    format, and would go on with random weights, meets something that it cannot load. Among coded tensors it stands for
    the first that is no expert, since experts are parts of a parameter.
    """
    coded = [tensor for tensor in tensors if tensor.codec != RAW]
    if not coded:
        return None
    first = next((tensor for tensor in coded if not _part(tensor.name)), coded[0])
    return Buffer(_parameter(first), "U8", (0,))


def _parameter(tensor: TensorSpec) -> str:
    """What the model calls a coded tensor: one that is multiplied from its codes has the name of its module."""
    if tensor.codec == LOSSLESS:
        return tensor.name
    return tensor.name.rpartition(".")[0] if _part(tensor.name) else f"{tensor.name}.weight"


def _part(name: str) -> bool:
    return name.rpartition(".")[2].isdecimal()


def check_tensor(tensor: TensorSpec) -> None:
    """Every rule about one tensor taken by itself; the writer and the reader hold it to the same ones.

    Raises:
        FormatError: the first rule that is broken.
    """
    name = quote(tensor.name)
    if tensor.name == "__metadata__":
        raise FormatError("'__metadata__' cannot be the name of a tensor")
    for text in (tensor.name, tensor.codec):
        if not (0 < len(text) <= MAX_NAME_CHARACTERS and text.isascii() and text.isprintable()):
            raise FormatError(
                f"tensor {name} has a name or codec that is not 1 to {MAX_NAME_CHARACTERS} printable ASCII characters"
            )
    if tensor.dtype not in ITEM_BYTES:
        raise FormatError(f"tensor {name} has dtype {quote(tensor.dtype)}, not one of {', '.join(ITEM_BYTES)}")
    if not tensor.buffers:
        raise FormatError(f"tensor {name} has no buffer")
    for buffer, key in zip(tensor.buffers, tensor.keys, strict=True):
        _check_buffer(buffer)
        if buffer.name != buffer_name(tensor.name, key):
            raise FormatError(f"buffer {quote(buffer.name)} is not named after its tensor {name}")
        if tensor.codec != RAW and (not _BUFFER_KEY.fullmatch(key) or key == "weight"):
            raise FormatError(
                f"buffer {quote(buffer.name)} of a packed tensor ends in {quote(key)}, which is not permitted"
            )
        if tensor.codec != RAW and buffer.size_bytes % 2:
            raise FormatError(
                f"buffer {quote(buffer.name)} has {buffer.size_bytes} bytes, which is odd and would misalign the next "
                "one"
            )
    if tensor.codec == RAW:
        only = tensor.buffers[0]
        if len(tensor.buffers) != 1 or (only.name, only.dtype, only.shape) != (tensor.name, tensor.dtype, tensor.shape):
            raise FormatError(f"raw tensor {name} is not exactly one buffer of its own name, dtype and shape")


def _check_buffer(buffer: Buffer) -> None:
    name = quote(buffer.name)
    if buffer.dtype not in ITEM_BYTES:
        raise FormatError(f"buffer {name} has dtype {quote(buffer.dtype)}, not one of {', '.join(ITEM_BYTES)}")
    if len(buffer.shape) > MAX_DIMENSIONS or min(buffer.shape, default=0) < 0:
        raise FormatError(f"buffer {name} has a shape with negative or more than {MAX_DIMENSIONS} dimensions")


def is_file_name(name: str) -> bool:
    """Whether an artifact can hold a file of this name."""
    return _FILE_NAME.fullmatch(name) is not None


def check_file_name(name: str) -> None:
    """Refuse a file name that could lead out of the artifact's directory or hide in it.

    Raises:
        FormatError: on separators, a leading dot, anything but plain ASCII, or more than 255 characters.
    """
    if not is_file_name(name):
        raise FormatError(f"{quote(name)} is not a plain file name")


def digest(data: bytes | bytearray | memoryview) -> str:
    """BLAKE2b with 8 bytes of output (RFC 7693), as 16 hex digits: finds accidents, not forgers."""
    state = hasher()
    state.update(data)
    return state.hexdigest()


def hasher() -> hashlib.blake2b:
    """A digest in the making: `update` and `hexdigest`."""
    return hashlib.blake2b(digest_size=8)


def digest_region(file: BinaryIO, offset_bytes: int, size_bytes: int) -> str:
    """Digest of a region of an open file, in constant memory.

    Raises:
        FormatError: the file ends before it.
    """
    state = hasher()
    file.seek(offset_bytes)
    while size_bytes:
        chunk = file.read(min(size_bytes, _CHUNK_BYTES))
        if not chunk:
            raise FormatError(f"it ends {size_bytes} bytes early")
        state.update(chunk)
        size_bytes -= len(chunk)
    return state.hexdigest()


def digest_file(path: Path) -> tuple[int, str]:
    """Size in bytes and digest of a whole file."""
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        return size_bytes, digest_region(file, 0, size_bytes)


def is_digest(value: object) -> bool:
    """Whether `value` is written as a digest is."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def compact_json(value: object, *, sort_keys: bool = False) -> bytes:
    """The one way in which the format writes JSON: ASCII, no white space."""
    return json.dumps(value, separators=(",", ":"), sort_keys=sort_keys, allow_nan=False).encode("ascii")


def strict_json(text: bytes) -> dict[str, Any]:
    """Parse one JSON object as the format wants it: ASCII, no key twice, only finite numbers of sensible length.

    Raises:
        FormatError: on anything else, however deep or long.
    """
    if sum(map(text.count, (b"{", b"[", b","))) > MAX_VALUES:  # before any of them takes memory
        raise FormatError(f"its JSON holds more than {MAX_VALUES} values", "use smaller shards")
    try:
        value = json.loads(
            text.decode("ascii"),
            object_pairs_hook=_object_without_duplicates,
            parse_int=_sensible_int,
            parse_float=_sensible_float,
            parse_constant=_no_constant,
        )
    except FormatError:
        raise
    except RecursionError:
        raise FormatError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"its JSON does not parse ({error})") from None
    if not isinstance(value, dict):
        raise FormatError("its JSON is not an object")
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise FormatError("a key of its JSON occurs twice")
    return value


def _sensible_int(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARACTERS:
        raise FormatError(f"its JSON has a number of {len(text)} characters")
    return int(text)


def _sensible_float(text: str) -> float:
    value = float(text) if len(text) <= MAX_NUMBER_CHARACTERS else math.inf
    if not math.isfinite(value):
        raise FormatError(f"its JSON has the number {text[:MAX_NUMBER_CHARACTERS]}")
    return value


def _no_constant(text: str) -> float:
    raise FormatError(f"its JSON has the number {text}")


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn a broken rule, or what the system says of a file, into an `ArtifactError` that names `path`."""
    try:
        yield
    except FormatError as fault:
        raise ArtifactError(f"{path} is refused: {fault}; {fault.remedy or 'fetch it again, or pack again'}") from fault
    except UnfitFileError as fault:
        raise ArtifactError(f"{path} is refused: {fault}; fetch it again, or pack again") from fault
    except OSError as error:
        remedy = (
            "free some space and run again" if error.errno == errno.ENOSPC else "check that it is there and permitted"
        )
        raise ArtifactError(f"{path} cannot be read or written ({error.strerror or error}); {remedy}") from error
