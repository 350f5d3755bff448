"""Disks that are full: a small one in memory where mounts are allowed, else a writer that fails as a full one does."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path

import pytest

BALLAST = "ballast"
MIB = 2**20


class SmallDisk:
    """A tmpfs of so many bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        mount = shutil.which("mount")
        done = mount and subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        )
        if not done or done.returncode:
            pytest.skip("mounts are not allowed here")

    def fill(self, leave: int = 0) -> None:
        """Take all space but so many bytes."""
        with (self.folder / BALLAST).open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            file.truncate(max(0, file.tell() - leave))

    def free(self) -> None:
        (self.folder / BALLAST).unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


class FailingWriter:
    """Python's own writes below a folder write a part and then raise ENOSPC, once the disk is said to be full."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.left = folder, None
        plain, disk = Path.open, self

        def opened(path: Path, mode: str = "r", *given, **named):
            file = plain(path, mode, *given, **named)
            if disk.left is None or not set(mode) & set("wa") or disk.folder not in path.parents:
                return file
            return Writer(file, disk)

        monkeypatch.setattr(Path, "open", opened)

    def fill(self, leave: int = 0) -> None:
        self.left = leave

    def free(self) -> None:
        self.left = None

    def close(self) -> None:
        self.free()


class Writer:
    """A file on a full disk."""

    def __init__(self, file, disk: FailingWriter) -> None:
        self._file, self._disk = file, disk

    def write(self, content):
        room = max(0, self._disk.left)
        self._disk.left = room - len(content)
        if len(content) <= room:
            return self._file.write(content)
        self._file.write(content[:room])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
