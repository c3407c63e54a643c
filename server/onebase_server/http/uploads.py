"""multipart/form-data, piece by piece: files go straight to disk, never whole into memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from onebase_adapters.format.added_tokens import (
    TOKENIZER_FILES,
    BaseVocabulary,
    has_token_rows,
    with_tokens,
)
from onebase_adapters.format.config import (
    MAX_CONFIG_BYTES,
    MLX_WEIGHTS_FILE,
    MODEL_CONFIG_FILE,
    AdapterFormatError,
    names_labels,
    with_labels,
)
from onebase_adapters.format.conversion import convert, needs_conversion
from onebase_adapters.format.defaults import (
    DEFAULTS_FILE,
    DEFAULTS_FILES,
    MAX_DEFAULTS_BYTES,
    parse_defaults,
    read_defaults,
    too_large,
    with_defaults,
)
from onebase_adapters.registry import UPLOADED, Purpose
from onebase_adapters.signatures import (
    MAX_SIGNATURE_BYTES,
    SIGNATURE_FILE,
    Checked,
    SentFiles,
    SignatureError,
)
from onebase_adapters.store.blobs import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    store_errors,
)
from onebase_adapters.store.store import BlobWriter, Store
from onebase_edge.background import Threads
from onebase_edge.errors import BodyTooLargeError, ClientGoneError, InvalidRequestError
from onebase_edge.settings import SettingsError, parse_bool
from onebase_server.jobs.files import BATCH_ENDING, TrainingFiles, check_filename, ending

MAX_FIELD_BYTES = 1000
MAX_PARTS = 16
MAX_HEADERS = 8
MAX_HEADER_BYTES = 4096
_FORM = b"multipart/form-data"
_BATCH_BYTES = 1 << 20
"""Number of bytes that are read before a thread parses and writes them."""

FLAGS = ("activate", "allow_noop", "any_base")
_FILES_FIELD = "files"
DEFAULTS_FORM_FIELD = "defaults"
"""Field with defaults as JSON, which replace those of the files one by one."""
ADAPTER_FIELDS = (
    f"Send a field name and two parts called {_FILES_FIELD}, with file names {' and '.join(ADAPTER_FILES)}; "
    f"for a classifier perhaps {MODEL_CONFIG_FILE}, which names its labels, and for tokens that it adds its "
    f"tokenizer's: {', '.join(TOKENIZER_FILES)}. Of mlx-lm the second one is {MLX_WEIGHTS_FILE}. Defaults of "
    f"requests are in one of {', '.join(DEFAULTS_FILES)}, and in a field {DEFAULTS_FORM_FIELD}, as JSON. "
    f"A signature is in {SIGNATURE_FILE}."
)
_SMALL = {
    CONFIG_FILE: MAX_CONFIG_BYTES,
    MODEL_CONFIG_FILE: MAX_CONFIG_BYTES,
    SIGNATURE_FILE: MAX_SIGNATURE_BYTES,
    **DEFAULTS_FILES,
}
"""Files that are read whole, and the largest size of each, in bytes."""
_CUT_OFF = {SIGNATURE_FILE, *DEFAULTS_FILES} - {DEFAULTS_FILE}
"""Files without which an adapter can be used, so that one that is too large is no error by itself."""
FILE_OPTION = "--max-train-file"
FORM_BYTES = 64 << 10
"""Largest size, in bytes, of a form besides its file: boundaries, headers, fields."""
FILE_FIELDS = (
    f"Send a field purpose with the value {' or '.join(UPLOADED)}, and a part called file, with a file name."
)

Result = TypeVar("Result", covariant=True)
Write = Callable[[memoryview], None]


class FormReader(ABC, Generic[Result]):
    """Parses a body piece by piece, in any number of pieces. For one thread at a time.

    Raises InvalidRequestError or BodyTooLargeError as soon as something is wrong, and what writing the
    files raises. `close` in any case.

    Args:
        limit: bytes of the whole body; `option`: the server's option that sets it.
        how: one sentence that says what the form holds; ends every complaint.
    """

    def __init__(self, boundary: bytes, *, limit: int, option: str, how: str) -> None:
        self.fields: dict[str, bytes] = {}
        self._limit = limit
        self._option = option
        self._how = how
        self._size = 0
        self._parts = 0
        self._header: list[bytearray] = []
        self._write: Write = lambda data: None
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary, self._callbacks(), max_header_count=MAX_HEADERS, max_header_size=MAX_HEADER_BYTES
            )
        except FormParserError as error:
            raise self.malformed(str(error)) from error

    @abstractmethod
    def begin_part(self, field: str, filename: str | None) -> Write | None:
        """Return what takes the part's content: a file's writer or `plain_field(field)`; None: no such
        field."""

    @abstractmethod
    def result(self) -> Result:
        """Return the form's content. Raises InvalidRequestError when something is missing."""

    @abstractmethod
    def close(self) -> None:
        """Remove what was not committed."""

    def feed(self, data: bytes) -> None:
        """Parse the next piece of the body."""
        self._size += len(data)
        if self._size > self._limit:
            raise BodyTooLargeError(self._limit, self._option)
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise self.malformed(str(error)) from error

    def finish(self) -> Result:
        """Return the form's content, after the last piece. Raises InvalidRequestError."""
        if not self._complete:
            raise self.malformed("it ends before its last boundary")
        return self.result()

    def plain_field(self, field: str, most: int = MAX_FIELD_BYTES) -> Write:
        """Return a writer that keeps a short field in `fields`. most: bytes."""
        if field in self.fields:
            raise InvalidRequestError(f"{field}: it is given twice. Give it once.", param=field)
        self.fields[field] = b""

        def write(data: memoryview) -> None:
            if len(self.fields[field]) + len(data) > most:
                raise InvalidRequestError(f"{field}: it is over {most} bytes. Send less.", param=field)
            self.fields[field] += data

        return write

    def text(self, field: str) -> str:
        """Return a field as text. Raises InvalidRequestError when it is missing or is not UTF-8."""
        if field not in self.fields:
            raise InvalidRequestError(f"{field}: it is missing. {self._how}", param=field)
        try:
            return self.fields[field].decode()
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{field}: it is not UTF-8.", param=field) from error

    def malformed(self, reason: str) -> InvalidRequestError:
        """Return the error for a body that cannot be read."""
        return malformed(f"{reason}. {self._how}")

    # ---- the parser's events -----------------------------------------------------------------

    def _callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin_part,
            "on_header_begin": lambda: self._header.extend((bytearray(), bytearray())),
            "on_header_field": lambda data, start, end: self._header[-2].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[-1].extend(data[start:end]),
            "on_headers_finished": self._begin_data,
            "on_part_data": lambda data, start, end: self._write(memoryview(data)[start:end]),
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise self.malformed(f"it has more than {MAX_PARTS} parts")
        self._header = []

    def _begin_data(self) -> None:
        pairs = zip(self._header[::2], self._header[1::2], strict=True)
        headers = {bytes(name).lower(): bytes(value) for name, value in pairs}
        kind, options = parse_options_header(headers.get(b"content-disposition", b"").decode("latin-1"))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not field:
            raise self.malformed("a part has no Content-Disposition: form-data with a name")
        filename = options.get(b"filename")
        write = self.begin_part(field, None if filename is None else filename.decode("utf-8", "replace"))
        if write is None:
            raise InvalidRequestError(
                f"{field[:80]}: an upload has no such field. {self._how}", param=field[:80]
            )
        self._write = write

    def _end(self) -> None:
        self._complete = True


def is_form(content_type: bytes) -> bool:
    """Return True if a body of this Content-Type is read as multipart/form-data."""
    return parse_options_header(content_type)[0] == _FORM


def boundary_of(request: Request, how: str = "") -> bytes | None:
    """Return the boundary of a multipart body; None if the body is something else. Raises
    InvalidRequestError."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != _FORM:
        return None
    boundary = options.get(b"boundary", b"")
    if not boundary:
        raise malformed(f"its Content-Type names no boundary. {how}")
    return boundary


def check_length(request: Request, limit: int, option: str) -> int:
    """Refuse a body by its announced length. Returns what it may hold, without the form around it.

    Raises BodyTooLargeError.
    """
    length = request.headers.get("content-length", "")
    if not length.isdigit():
        return limit
    if int(length) > limit:
        raise BodyTooLargeError(limit, option)
    return max(1, int(length) - FORM_BYTES)


async def read_form(request: Request, form: FormReader[Result], threads: Threads) -> Result:
    """Feed the request's body to the form, a piece at a time, in threads.

    Raises ClientGoneError, and what the form raises.
    """
    batch = bytearray()
    try:
        async for chunk in request.stream():
            batch += chunk
            if len(batch) >= _BATCH_BYTES:
                await threads.run_blocking(form.feed, bytes(batch))
                batch.clear()
    except ClientDisconnect as error:
        raise ClientGoneError from error
    await threads.run_blocking(form.feed, bytes(batch))
    return await threads.run_blocking(form.finish)


def malformed(reason: str) -> InvalidRequestError:
    """Return the error for a multipart body that cannot be read."""
    return InvalidRequestError(
        f"The multipart body cannot be read: {reason}".rstrip(), code="invalid_multipart"
    )


# ---- an adapter -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """One upload: its fields, its config as it will be kept, and its files once they are committed."""

    name: str
    flags: dict[str, bool]
    config: bytes
    commit: Callable[[], AdapterFiles]
    """Makes the files part of the store; call it in a thread. Raises DiskFullError, StoreError."""
    checked: Checked | None = None
    """Result of verifying its signature."""


class SignatureRefusedError(Exception):
    """The signature of an upload is not accepted. name: of the adapter; reason: what the policy said."""

    def __init__(self, name: str, reason: SignatureError) -> None:
        super().__init__(str(reason))
        self.name = name
        self.reason = reason


def _unsigned(name: str, sent: SentFiles) -> Checked | None:
    return None


class AdapterForm(FormReader[Upload]):
    """Writes the weights as they arrive; `close` deletes them unless they were committed.

    What another trainer saved becomes PEFT's own form of it. Raises also DiskFullError, StoreError.
    """

    def __init__(
        self,
        store: Store,
        boundary: bytes,
        limit: int,
        vocabulary: Callable[[], BaseVocabulary | None] = lambda: None,
        check_signature: Callable[[str, SentFiles], Checked | None] = _unsigned,
    ) -> None:
        """vocabulary: returns the base's tokens, by which those are found that a tokenizer adds.
        check_signature: raises SignatureError unless the files may have the adapter's name."""
        self._check_signature = check_signature
        self._weights_name = WEIGHTS_FILE
        self._vocabulary = vocabulary
        self._tokenizer: dict[str, BlobWriter] = {}
        self._store = store
        self._small: dict[str, bytearray] = {}
        self._config = b""
        self._weights: BlobWriter | None = None
        super().__init__(boundary, limit=limit, option="--max-upload", how=ADAPTER_FIELDS)

    def begin_part(self, field: str, filename: str | None) -> Write | None:
        if field == _FILES_FIELD:
            return self._begin_file(filename or "")
        if field == DEFAULTS_FORM_FIELD:
            return self.plain_field(field, MAX_DEFAULTS_BYTES)
        return self.plain_field(field) if field == "name" or field in FLAGS else None

    def result(self) -> Upload:
        given = {*self._small, *([WEIGHTS_FILE] if self._weights is not None else ())}
        missing = [name for name in ADAPTER_FILES if name not in given]
        if missing:
            raise InvalidRequestError(f"files: {missing[0]} is missing. {ADAPTER_FIELDS}", param=_FILES_FIELD)
        name = self.text("name")
        try:
            checked = self._check_signature(name, self._sent())
        except SignatureError as error:
            raise SignatureRefusedError(name, error) from error
        flags = {flag: self._flag(flag) for flag in FLAGS if flag in self.fields}
        model = self._small.get(MODEL_CONFIG_FILE)
        try:
            self._convert()
            self._config = with_labels(
                bytes(self._small[CONFIG_FILE]), None if model is None else bytes(model)
            )
            self._config = with_defaults(self._config, *self._defaults())
            if self._tokenizer and self._weights is not None:
                with store_errors("reading an upload"):
                    self._config = with_tokens(
                        self._config, self._weights.path, self._read_tokenizer, self._vocabulary
                    )
        except AdapterFormatError as error:
            raise InvalidRequestError(f"files: {error}.", param=_FILES_FIELD) from error
        return Upload(name, flags, self._config, self._commit, checked)

    def close(self) -> None:
        for writer in self._tokenizer.values():
            writer.abort()
        if self._weights is not None:
            self._weights.abort()

    def _sent(self) -> SentFiles:
        """Return the sums of all files as they were sent, and their signature."""
        small = {name: bytes(content) for name, content in self._small.items()}
        bundle = small.pop(SIGNATURE_FILE, None)
        if DEFAULTS_FORM_FIELD in self.fields:
            small[f"the field {DEFAULTS_FORM_FIELD}"] = self.fields[DEFAULTS_FORM_FIELD]
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
        sums |= {name: writer.sha256 for name, writer in self._tokenizer.items()}
        config, takes_tokens = bytes(self._small[CONFIG_FILE]), False
        if self._weights is not None:
            sums[self._weights_name] = self._weights.sha256
            with store_errors("reading an upload"):
                takes_tokens = bundle is not None and has_token_rows(config, self._weights.path)
        return SentFiles(sums, bundle, names_labels(config), takes_tokens)

    def _read_defaults(self, name: str) -> bytes | None:
        if len(self._small.get(name, b"")) > DEFAULTS_FILES[name]:
            raise too_large(name)
        return bytes(self._small[name]) if name in self._small else None

    def _defaults(self) -> tuple[dict[str, Any] | None, ...]:
        """Return the defaults in a file, and those in the form's own field. Raises InvalidRequestError."""
        field, given = _FILES_FIELD, self.fields.get(DEFAULTS_FORM_FIELD)
        try:
            of_file = read_defaults(self._read_defaults)
            field = DEFAULTS_FORM_FIELD
            return of_file, None if given is None else parse_defaults(given, field)
        except AdapterFormatError as error:
            raise InvalidRequestError(f"{error}.", param=field, code="bad_defaults") from error

    def _read_tokenizer(self, name: str) -> bytes | None:
        return self._tokenizer[name].path.read_bytes() if name in self._tokenizer else None

    def _convert(self) -> None:
        """Replace the files by PEFT's own form of them. Raises AdapterFormatError."""
        sent, config = self._weights, bytes(self._small[CONFIG_FILE])
        with store_errors("reading an upload"):
            if sent is None or not needs_conversion(config, sent.path):
                return
            self._weights = self._store.writer()
            try:
                self._small[CONFIG_FILE] = bytearray(convert(config, sent.path, self._weights.write))
            finally:
                sent.abort()

    def _commit(self) -> AdapterFiles:
        if self._weights is None:
            raise RuntimeError("committed before the form's result")
        return AdapterFiles(self._store.add_bytes(self._config), self._weights.commit())

    def _begin_file(self, name: str) -> Write:
        if name == MLX_WEIGHTS_FILE:
            self._weights_name, name = name, WEIGHTS_FILE
        if name in TOKENIZER_FILES and name not in self._tokenizer:
            self._tokenizer[name] = self._store.writer()
            return partial(self._keep_tokenizer, name)
        if name not in (*ADAPTER_FILES, *_SMALL, *TOKENIZER_FILES):
            raise InvalidRequestError(
                f"files: {name[:80]!r} is not one of the two files of an adapter. {ADAPTER_FIELDS}",
                param=_FILES_FIELD,
            )
        if (
            name in self._small
            or name in self._tokenizer
            or (name == WEIGHTS_FILE and self._weights is not None)
        ):
            raise InvalidRequestError(f"files: {name} is there twice. Send it once.", param=_FILES_FIELD)
        if name in _SMALL:
            self._small[name] = bytearray()
            return partial(self._keep, name)
        self._weights = self._store.writer()
        return self._weights.write

    def _keep(self, name: str, data: memoryview) -> None:
        most = _SMALL[name]
        if name in _CUT_OFF:
            data = data[: most + 1 - len(self._small[name])]  # one byte more says that it is too large
        elif len(self._small[name]) + len(data) > most:
            raise InvalidRequestError(
                f"files: {name} is over {most} bytes, which no such file is.", param=_FILES_FIELD
            )
        self._small[name] += data

    def _keep_tokenizer(self, name: str, data: memoryview) -> None:
        writer, most = self._tokenizer[name], TOKENIZER_FILES[name]
        if writer.size + len(data) > most:
            raise InvalidRequestError(f"files: {name} is over {most} bytes.", param=_FILES_FIELD)
        writer.write(data)

    def _flag(self, field: str) -> bool:
        try:
            return parse_bool(self.text(field))
        except SettingsError as error:
            raise InvalidRequestError(f"{field}: {error}.", param=field) from error


# ---- a file of a job or a batch -------------------------------------------------------------------


@dataclass(frozen=True)
class FileUpload:
    """A file that has arrived, and is not kept yet."""

    filename: str
    purpose: Purpose
    writer: BlobWriter


class FileForm(FormReader[FileUpload]):
    """Writes the file as it arrives; `close` deletes it unless it was kept. Raises also StoreError."""

    def __init__(self, files: TrainingFiles, boundary: bytes) -> None:
        self._files = files
        self._writer: BlobWriter | None = None
        self._filename = ""
        super().__init__(boundary, limit=files.limit + FORM_BYTES, option=FILE_OPTION, how=FILE_FIELDS)

    def begin_part(self, field: str, filename: str | None) -> Write | None:
        if field == "purpose":
            return self.plain_field(field)
        if field.startswith("expires_after"):
            raise InvalidRequestError(
                "expires_after: files are kept until they are deleted (DELETE /v1/files/{id}). Leave it out.",
                param="expires_after",
            )
        if field != "file":
            return None
        if self._writer is not None:
            raise InvalidRequestError("file: there are two. Send one.", param="file")
        self._filename = check_filename(filename or "")
        self._writer = self._files.store.writer()
        return self._writer.write

    def result(self) -> FileUpload:
        purpose = self.text("purpose")
        if purpose not in UPLOADED:
            raise InvalidRequestError(
                f"purpose: {purpose[:80]!r} is not served here; files are for jobs and batches: write "
                f"{' or '.join(UPLOADED)}.",
                param="purpose",
            )
        if self._writer is None:
            raise InvalidRequestError(f"file: it is missing. {FILE_FIELDS}", param="file")
        if self._writer.size == 0:
            raise InvalidRequestError("file: it is empty.", param="file")
        if purpose == "batch" and ending(self._filename) != BATCH_ENDING:
            raise InvalidRequestError(
                f"file: {self._filename[:80]!r} does not end in {BATCH_ENDING}: a batch's file has one "
                "request a line. Rename it.",
                param="file",
            )
        return FileUpload(self._filename, "batch" if purpose == "batch" else "fine-tune", self._writer)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.abort()
