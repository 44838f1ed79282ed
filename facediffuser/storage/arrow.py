"""A store as a pyarrow file system, for pyarrow.dataset: read only, through the store's own client."""

import pyarrow as pa
import pyarrow.fs

from facediffuser.storage.base import Store


def arrow_filesystem(store: Store) -> pyarrow.fs.FileSystem:
    """Return a file system whose paths are the store's keys; what would change the store raises NotImplementedError."""
    return pyarrow.fs.PyFileSystem(_ReadOnly(store))


class _ReadOnly(pyarrow.fs.FileSystemHandler):
    def __init__(self, store: Store):
        self.store = store

    def get_type_name(self) -> str:
        return "facediffuser-store"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> pyarrow.fs.FileInfo:
        kind = pyarrow.fs.FileType.File if self.store.exists(path) else pyarrow.fs.FileType.NotFound
        return pyarrow.fs.FileInfo(path, kind)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(self.store.reader(path), mode="r")

    open_input_stream = open_input_file

    def _refuse(self, *_) -> None:
        raise NotImplementedError("read only; write through the store")

    get_file_info_selector = create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = _refuse
    delete_file = move = copy_file = open_append_stream = open_output_stream = _refuse
