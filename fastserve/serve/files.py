"""Files that clients upload for batches, and the results of batches: on disk in the state folder, bounded.

The state folder holds `files/` and `batches/`, each entry a JSON description next to its content; it belongs to one
server at a time. What a client sends never becomes a path: files are found by ids that were made here.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import uuid
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.datastructures import UploadFile

from fastserve.core.errors import ConfigError
from fastserve.serve.errors import ApiError
from fastserve.serve.response_store import page
from fastserve.serve.tenants import tenant_of

FILES_PATH = "/v1/files"
MAX_UPLOAD_BYTES = 64 * 1024 * 1024
MAX_FILES = 10_000
_MAX_NAME = 255
PURPOSE = "batch"
_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class StoredFile(msgspec.Struct):
    """One file. `created_at` in seconds since the epoch; `tenant` is who may see it."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    tenant: str

    def shown(self) -> dict[str, Any]:
        """OpenAI's form."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class StateFolder:
    """The folder, and the files in it; use `open`.

    Attributes:
        path: the folder.
        max_bytes: largest sum of all files.
    """

    def __init__(self, path: Path, max_bytes: int, lock: IO[str]) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._lock = lock
        found = [read_struct(file, StoredFile) for file in sorted((path / "files").glob("*.json"))]
        self._files = {file.id: file for file in sorted(found, key=lambda file: file.created_at)}

    @classmethod
    def open(cls, path: str, max_bytes: int) -> Self:
        """Make the folder, or take up what an earlier server left there.

        Raises:
            ConfigError: it cannot be written, is damaged, or another server uses it.
        """
        folder = Path(path).expanduser()
        try:
            for name in ("files", "batches"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            lock = (folder / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return cls(folder, max_bytes, lock)
        except BlockingIOError as error:
            raise ConfigError(f"another server uses state_folder {path}; choose another folder for this one") from error
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"cannot use state_folder {path}: {error}") from error

    def close(self) -> None:
        """Let another server use the folder."""
        self._lock.close()

    @property
    def num_bytes(self) -> int:
        """What all files take."""
        return sum(file.bytes for file in self._files.values())

    def content(self, file_id: str) -> Path:
        """Where the content of a file is, or will be."""
        return self.path / "files" / f"{file_id}.jsonl"

    def check_room(self, num_bytes: int) -> None:
        """Raise ApiError (413) when so much more does not fit."""
        if len(self._files) >= MAX_FILES or self.num_bytes + num_bytes > self.max_bytes:
            raise ApiError(
                f"no room for {num_bytes} more bytes: {len(self._files)} files take {self.num_bytes} of "
                f"{self.max_bytes} bytes (max_state_bytes); delete files that are not needed",
                413,
            )

    def register(self, file_id: str, filename: str, purpose: str, tenant: str) -> StoredFile:
        """Make a file known whose content is there already."""
        size = self.content(file_id).stat().st_size
        stored = StoredFile(file_id, size, int(time.time()), filename[:_MAX_NAME], purpose, tenant)
        write_struct(self.path / "files" / f"{file_id}.json", stored)
        self._files[file_id] = stored
        return stored

    def files(self, tenant: str) -> list[StoredFile]:
        """Files of a tenant, the oldest first."""
        return [file for file in self._files.values() if file.tenant == tenant]

    def get(self, file_id: str, tenant: str, param: str | None = None) -> StoredFile:
        """The file of this id. Raises ApiError (404) when this tenant has none such."""
        stored = self._files.get(file_id)
        if stored is None or stored.tenant != tenant:
            raise ApiError(f"there is no file {file_id[:100]!r}", 404, param=param, code="file_not_found")
        return stored

    def delete(self, file_id: str, tenant: str) -> None:
        """Remove a file. Raises ApiError (404) as `get` does."""
        self.get(file_id, tenant)
        (self.path / "files" / f"{file_id}.json").unlink(missing_ok=True)
        self.content(file_id).unlink(missing_ok=True)
        del self._files[file_id]


class FilesApi:
    """The endpoints. Without a state folder each of them says how to get one."""

    def __init__(self, state: StateFolder | None) -> None:
        self._state = state

    def add_routes(self, router: APIRouter) -> None:
        form = {"type": "object", "required": ["file", "purpose"], "properties": _FORM}
        extra = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}
        router.post(FILES_PATH, summary="Upload a file for a batch", openapi_extra=extra)(self.upload)
        router.get(FILES_PATH, summary="List the files")(self.list)
        router.get("/v1/files/{file_id}", summary="Describe a file")(self.get)
        router.delete("/v1/files/{file_id}", summary="Delete a file")(self.delete)
        router.get("/v1/files/{file_id}/content", summary="The content of a file")(self.content)

    async def upload(self, request: Request) -> Response:
        """Take a file of one JSON request per line."""
        state = opened(self._state)
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError("send the file as multipart/form-data, with the fields file and purpose")
        try:
            form = await request.form(max_files=1, max_fields=8, max_part_size=64 * 1024)
        except Exception as error:  # starlette turns problems of a form into its own HTTP errors
            raise ApiError(f"the form cannot be read: {getattr(error, 'detail', type(error).__name__)}") from error
        try:
            file, purpose = form.get("file"), form.get("purpose")
            if unknown := set(form) - {"file", "purpose"}:
                raise ApiError(f"{min(unknown)[:100]} is not supported", param=min(unknown)[:100])
            if not isinstance(file, UploadFile):
                raise ApiError("file must be a file", param="file")
            if purpose != PURPOSE:
                raise ApiError(f"purpose must be {PURPOSE}; other files have no use here", param="purpose")
            state.check_room(file.size or 0)
            file_id = f"file-{uuid.uuid4().hex}"
            with WholeFile(state.content(file_id)) as target:
                while data := await file.read(1 << 20):
                    target.write(data)
            return _json(state.register(file_id, file.filename or "", PURPOSE, tenant_of(request)).shown())
        finally:
            await form.close()

    async def list(
        self,
        request: Request,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 20,
        order: str = "desc",
    ) -> Response:
        """The caller's files."""
        files = opened(self._state).files(tenant_of(request))
        shown = [file.shown() for file in files if purpose in (None, file.purpose)]
        return _json(page(shown if order == "asc" else shown[::-1], after, limit))

    async def get(self, file_id: str, request: Request) -> Response:
        """What a file is."""
        return _json(opened(self._state).get(file_id, tenant_of(request)).shown())

    async def delete(self, file_id: str, request: Request) -> Response:
        """Remove a file; a batch that reads it fails."""
        opened(self._state).delete(file_id, tenant_of(request))
        return _json({"id": file_id, "object": "file", "deleted": True})

    async def content(self, file_id: str, request: Request) -> Response:
        """The content of a file."""
        state = opened(self._state)
        state.get(file_id, tenant_of(request))
        return FileResponse(state.content(file_id), media_type="application/octet-stream")


_FORM = {
    "file": {"type": "string", "format": "binary"},
    "purpose": {"type": "string", "enum": [PURPOSE]},
}


def opened(state: StateFolder | None) -> StateFolder:
    """The state folder. Raises ApiError (400) when the server has none."""
    if state is None:
        raise ApiError(
            "this server keeps no files: start it with --state-folder FOLDER to use files and batches",
            code="no_state_folder",
        )
    return state


class WholeFile:
    """`with WholeFile(path) as file:` writes a file that appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> IO[bytes]:
        descriptor, self._name = tempfile.mkstemp(dir=self._path.parent, prefix=".new-")
        self._file: IO[bytes] = os.fdopen(descriptor, "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if kind is None:
                os.replace(self._name, self._path)
        finally:
            Path(self._name).unlink(missing_ok=True)


def write_struct(path: Path, value: msgspec.Struct) -> None:
    """A struct as JSON, whole or not at all."""
    with WholeFile(path) as file:
        file.write(msgspec.json.encode(value))


def read_struct(path: Path, kind: type[_Struct]) -> _Struct:
    """What `write_struct` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=kind)


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
