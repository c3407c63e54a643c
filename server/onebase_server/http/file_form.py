"""One training file as multipart/form-data, straight to disk."""

from __future__ import annotations

from dataclasses import dataclass

from onebase_server.errors import InvalidRequestError
from onebase_server.http.multipart import FormReader, Write
from onebase_server.jobs.files import FileWriter, TrainingFiles, check_filename

OPTION = "--max-train-file"
FORM_BYTES = 64 << 10
"""What a form takes beside its file: boundaries, headers, fields."""
HOW = "Send a field purpose with the value fine-tune, and a part called file, with a file name."


@dataclass(frozen=True)
class FileUpload:
    """A file that has come, and is not kept yet."""

    filename: str
    writer: FileWriter


class FileForm(FormReader[FileUpload]):
    """Writes the file as it comes. Raises also StoreFullError. What was not kept is gone after `close`."""

    def __init__(self, files: TrainingFiles, boundary: bytes) -> None:
        self._files = files
        self._writer: FileWriter | None = None
        self._filename = ""
        super().__init__(boundary, limit=files.limit + FORM_BYTES, option=OPTION, how=HOW)

    def begin_part(self, field: str, filename: str | None) -> Write | None:
        if field == "purpose":
            return self.plain_field(field)
        if field != "file":
            return None
        if self._writer is not None:
            raise InvalidRequestError("file: there are two. Send one.", param="file")
        self._filename = check_filename(filename or "")
        self._writer = self._files.writer()
        return self._writer.write

    def result(self) -> FileUpload:
        purpose = self.text("purpose")
        if purpose != "fine-tune":
            raise InvalidRequestError(
                f"purpose: {purpose[:80]!r} is not served here; files are for jobs: write fine-tune.",
                param="purpose",
            )
        if self._writer is None:
            raise InvalidRequestError(f"file: it is missing. {HOW}", param="file")
        if self._writer.size == 0:
            raise InvalidRequestError("file: it is empty.", param="file")
        return FileUpload(self._filename, self._writer)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.abort()
