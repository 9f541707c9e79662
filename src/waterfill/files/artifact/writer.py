"""Layout + bytes → artifact directory, atomic and resumable (docs/format.md §7).

OUT.partial/artifact/      shards at their final size, filled by `write`; the other files by `publish`
OUT.partial/ledger.jsonl   one line per finished tensor; locked while a writer is open
OUT.partial/replaced/      the artifact that is being overwritten, between two renames
"""

from __future__ import annotations

import logging
import operator
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from waterfill.base.errors import ArtifactError
from waterfill.base.lazy import torch
from waterfill.base.writing import flush, resolved
from waterfill.files.artifact.format import (
    Buffer,
    FormatError,
    TensorSpec,
    check_file_name,
    digest,
    digest_file,
    digest_region,
    refusing,
)
from waterfill.files.artifact.header import Completion, carried_digest, encode_header
from waterfill.files.artifact.layout import Layout
from waterfill.files.artifact.ledger import Ledger
from waterfill.files.artifact.manifest import INDEX, MANIFEST, decode_manifest, encode_manifest

_log = logging.getLogger(__name__)

Data: TypeAlias = "bytes | bytearray | memoryview | torch.Tensor"


WORK, NEW, REPLACED, LEDGER = ".partial", "artifact", "replaced", "ledger.jsonl"


def check_target(out: Path, overwrite: bool) -> None:
    """Refuse to put an artifact where it would cover something that is not to be overwritten.

    A run that ended while it tidied up, behind its last rename, is no obstacle: the same run again ends there too.

    Raises:
        ArtifactError: `out` is neither absent nor an empty directory nor, with `overwrite`, an artifact; or it is the
            current directory, in whose place there would be another.
    """
    with refusing(out):
        real = resolved(out)
        if real == Path.cwd():
            raise ArtifactError(f"{real} is the current directory, which cannot be replaced; give another output")
        if not _untidied(real):
            _check_free(real, overwrite)


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ArtifactError(f"{out} exists already; give another output, or allow overwriting (--overwrite)")
    if not (out / MANIFEST).is_file():
        raise ArtifactError(
            f"{out} is not a packed model ({MANIFEST} is missing) and is not overwritten; give another output"
        )


def _untidied(out: Path) -> bool:
    """Whether there are an artifact and what a run leaves that ended behind its last rename."""
    work = out.with_name(out.name + WORK)
    return (out / MANIFEST).is_file() and work.is_dir() and {path.name for path in work.iterdir()} <= {LEDGER, REPLACED}


class ArtifactWriter:
    """Fills the artifact `out` buffer by buffer; use it in a `with` statement, from one thread.

    `identity` stands for all that decides the bytes (plan, checkpoint, seed). An unfinished run of the same identity
    and layout is continued: `pending()` says what is left. With `overwrite`, an unfinished run of another identity is
    discarded, and an artifact at `out` is replaced once the new one is complete.

    Raises:
        ArtifactError: if `out` exists, another process writes it, `OUT.partial` belongs to another run, or the disk is
            too small.
    """

    def __init__(self, out: Path, layout: Layout, identity: str, *, overwrite: bool = False) -> None:
        with refusing(out):
            self._out = resolved(out)
        self._layout = layout
        self._overwrite = overwrite
        self._tensors = {tensor.name: tensor for shard in layout.shards for tensor in shard.tensors}
        self._places: dict[str, tuple[Buffer, str, int]] = {
            buffer.name: (buffer, shard.file, offset) for shard in layout.shards for buffer, offset in shard.places()
        }
        self._owners = {buffer.name: tensor for tensor in self._tensors.values() for buffer in tensor.buffers}
        self._written_bytes = dict.fromkeys(self._places, 0)
        self._done: dict[str, Completion] = {}
        self._work = self._out.with_name(self._out.name + WORK)
        self._new = self._work / NEW
        self._replaced = self._work / REPLACED
        self._published = False  # by a run that ended while it tidied up
        with refusing(self._work):
            if not self._replaced.exists():
                check_target(self._out, overwrite)
            self._work.mkdir(parents=True, exist_ok=True)
            self._ledger = Ledger(self._work / LEDGER)
            try:
                self._prepare(identity)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop here and let another writer continue; does nothing after `publish`."""
        self._ledger.close()

    # ------------------------------------------------------------------------------------------- starting, resuming

    def _prepare(self, identity: str) -> None:
        if self._replaced.exists():  # a run ended inside _swap: before its second rename, or after
            if self._out.exists():
                shutil.rmtree(self._replaced)
            else:
                self._replaced.rename(self._out)
        run = {"identity": identity, "layout": digest(repr(self._layout).encode())}
        self._published = self._was_published(run)
        if self._published:
            return
        _check_free(self._out, self._overwrite)
        self._claim(run)
        for shard in self._layout.shards:
            with (self._new / shard.file).open("ab") as file:
                file.truncate(shard.size_bytes)
        self._resume()
        self._check_space()

    def _was_published(self, run: Mapping[str, str]) -> bool:
        """Whether `out` is what this run made: its ledger is complete and the new artifact gone, or both are gone."""
        if self._new.exists() or not (self._out / MANIFEST).is_file():
            return False
        lines = self._ledger.entries
        if not lines:  # removed already: `publish` compares what the artifact says of itself
            return not self._overwrite
        return lines[0] == run and {line["tensor"] for line in lines[1:]} == self._tensors.keys()

    def _claim(self, identity: Mapping[str, str]) -> None:
        """Continue the run that the ledger speaks of, or begin a new one in an empty directory."""
        shards = {shard.file for shard in self._layout.shards}
        unfinished = self._ledger.entries[0] if self._ledger.entries else None
        if unfinished == identity:
            for path in self._new.iterdir() if self._new.exists() else ():
                if path.name not in shards:
                    path.unlink()  # of a `publish` that did not end; it may be called with other files now
        elif unfinished is None or self._overwrite:
            if unfinished is not None:
                _log.warning("%s: discarding the unfinished run of another plan or checkpoint", self._work)
            self._ledger.clear()
            if self._new.exists():
                shutil.rmtree(self._new)
            self._ledger.append(identity)
        else:
            raise ArtifactError(
                f"{self._work} holds an unfinished run of another plan or checkpoint; "
                f"finish that one, remove it (rm -r '{self._work}'), or allow overwriting"
            )
        self._new.mkdir(exist_ok=True)

    def _resume(self) -> None:
        """Believe the ledger about every tensor whose bytes are still what they were: a power cut can lose pages."""
        for entry in {entry["tensor"]: entry for entry in self._ledger.entries[1:]}.values():
            done = Completion(entry["exponent"], entry["t2"], tuple(entry["digests"]))
            tensor = self._tensors[entry["tensor"]]
            if self._digests(tensor) == done.digests:
                self._done[tensor.name] = done
            else:
                _log.warning("%s: tensor %s was lost and is packed again", self._work, tensor.name)
        if self._done:
            _log.info("%s: continuing, %d of %d tensors are done", self._work, len(self._done), len(self._tensors))

    def _check_space(self) -> None:
        needed = sum(tensor.size_bytes for tensor in self.pending())
        free = shutil.disk_usage(self._work).free
        if needed > free:
            raise ArtifactError(
                f"{self._work} needs {needed} more bytes and its disk has {free} free; free some space and run again"
            )

    # ------------------------------------------------------------------------------------------------------ filling

    def pending(self) -> tuple[TensorSpec, ...]:
        """Tensors that are not complete yet, in file order; all buffers of such a tensor are to be written."""
        if self._published:
            return ()
        return tuple(tensor for tensor in self._tensors.values() if tensor.name not in self._done)

    def write(self, buffer_name: str, offset_bytes: int, data: Data) -> None:
        """Put `data` (contiguous bytes, or a tensor of any dtype) at `offset_bytes` of a buffer.

        Blocks may come in any order, but each byte is written once.
        """
        if buffer_name not in self._places:
            raise ArtifactError(
                f"{self._out}: {buffer_name!r} is not a buffer of this artifact; write only what was laid out"
            )
        buffer, shard, start = self._places[buffer_name]
        content = _bytes_of(data)
        end = offset_bytes + content.nbytes
        if not 0 <= offset_bytes <= end <= buffer.size_bytes or self._owners[buffer_name].name in self._done:
            raise ArtifactError(
                f"{self._out}: bytes {offset_bytes} to {end} of buffer {buffer_name!r} cannot be written; "
                f"it has {buffer.size_bytes} bytes and must not be complete"
            )
        with refusing(self._new / shard), (self._new / shard).open("r+b", buffering=0) as file:
            file.seek(start + offset_bytes)
            while content:
                content = content[file.write(content) :]
        self._written_bytes[buffer_name] += end - offset_bytes

    def complete(self, tensor_name: str, *, exponent: int = 0, t2: float = 0.0) -> None:
        """Declare a tensor finished: read its bytes back, and note their digests in the ledger.

        Raises:
            ArtifactError: if a byte is missing, or `exponent` or `t2` outside what the format can hold.
        """
        if tensor_name not in self._tensors or tensor_name in self._done:
            raise ArtifactError(f"{self._out}: tensor {tensor_name!r} is not pending; complete each tensor once")
        tensor = self._tensors[tensor_name]
        for buffer in tensor.buffers:
            written = self._written_bytes[buffer.name]
            if written != buffer.size_bytes:
                raise ArtifactError(
                    f"{self._out}: {written} of the {buffer.size_bytes} bytes of {buffer.name!r} were written; "
                    f"write each once"
                )
        with refusing(self._work):
            try:
                done = Completion(operator.index(exponent), float(f"{t2:.6e}"), self._digests(tensor))
            except FormatError as fault:
                raise FormatError(f"tensor {tensor_name!r}: {fault}") from None
            self._ledger.append(
                {"tensor": tensor_name, "exponent": done.exponent, "t2": done.t2, "digests": done.digests}
            )
        self._done[tensor_name] = done

    def _digests(self, tensor: TensorSpec) -> tuple[str, ...]:
        _, shard, _ = self._places[tensor.buffers[0].name]
        with (self._new / shard).open("rb") as file:
            return tuple(digest_region(file, self._places[b.name][2], b.size_bytes) for b in tensor.buffers)

    # --------------------------------------------------------------------------------------------------- publishing

    def publish(self, files: Mapping[str, bytes | Path]) -> Path:
        """Write headers, index, manifest and `files` (name → content, or file to copy), flush, and move all to `out`.

        Returns:
            The artifact's directory, complete.
        """
        if pending := self.pending():
            raise ArtifactError(
                f"{self._out}: {len(pending)} tensors are not complete, first {pending[0].name!r}; complete them first"
            )
        if self._published and self._finish(files):
            return self._out
        with refusing(self._out):
            headers = self._write_headers()
            others = self._write_files(files)
            sizes = {shard.file: shard.size_bytes for shard in self._layout.shards}
            shards = {name: (sizes[name], value) for name, value in headers.items()}
            (self._new / MANIFEST).write_bytes(encode_manifest(others, shards))
            for path in self._new.iterdir():
                flush(path)
            flush(self._new)
            self._swap()
        return self._out

    def _finish(self, files: Mapping[str, bytes | Path]) -> bool:
        """Tidy up behind a run that put its artifact in place; False where that has other `files`, and is replaced."""
        with refusing(self._out):
            if self._holds(files):
                _log.info("%s is complete: an earlier run was ended while it tidied up", self._out)
                self._tidy()
                return True
            if not self._overwrite:
                self._tidy()
                _check_free(self._out, self._overwrite)
            self._out.rename(self._new)
            self._published = False
            self._resume()
        if self.pending():
            raise ArtifactError(f"{self._out} was damaged after it had been packed; run again")
        return False

    def _holds(self, files: Mapping[str, bytes | Path]) -> bool:
        """Whether the artifact at `out` is of this layout and has these files."""
        others, shards = decode_manifest((self._out / MANIFEST).read_bytes())
        expected = {
            name: digest_file(content) if isinstance(content, Path) else (len(content), digest(content))
            for name, content in files.items()
        }
        sizes = {shard.file: shard.size_bytes for shard in self._layout.shards}
        others.pop(INDEX, None)
        return others == expected and {name: size for name, (size, _) in shards.items()} == sizes

    def _write_headers(self) -> dict[str, str]:
        digests = {}
        for shard in self._layout.shards:
            head = encode_header(shard.tensors, self._done, shard.header_bytes)
            digests[shard.file] = carried_digest(head)
            with (self._new / shard.file).open("r+b") as file:
                file.write(head)
        return digests

    def _write_files(self, files: Mapping[str, bytes | Path]) -> dict[str, tuple[int, str]]:
        """Everything but shards and manifest; sizes and digests by name."""
        for name, content in files.items():
            check_file_name(name)
            if name in (INDEX, MANIFEST) or name.endswith(".safetensors"):
                raise FormatError(f"{name!r} is a name that the artifact itself uses", "leave this file out")
            if isinstance(content, Path):
                shutil.copyfile(content, self._new / name)
            else:
                (self._new / name).write_bytes(content)
        index = self._layout.index()
        if index is not None:
            (self._new / INDEX).write_bytes(index)
        written = sorted([*files, INDEX] if index is not None else files)
        return {name: digest_file(self._new / name) for name in written}

    def _swap(self) -> None:
        """Two renames at most; what ends the process between them is undone by the next `_prepare`, what ends it behind
        them is completed by the next `publish`."""
        _check_free(self._out, self._overwrite)
        if self._out.exists():
            self._out.rename(self._replaced)
        self._new.rename(self._out)
        flush(self._out.parent)
        self._tidy()

    def _tidy(self) -> None:
        shutil.rmtree(self._replaced, ignore_errors=True)
        self._ledger.remove()
        with suppress(OSError):  # another run may have begun here already
            self._work.rmdir()


def _bytes_of(data: Data) -> memoryview:
    if isinstance(data, bytes | bytearray | memoryview):
        return memoryview(data).cast("B")
    return data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
