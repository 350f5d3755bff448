"""A PostgreSQL server of the tests' own, on loopback, by a user that is not root (the server refuses to be root's)."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browser
import pytest

PLACES = Path("/usr/lib/postgresql")  # Debian's package keeps its programs out of PATH
MISSING = "PostgreSQL is not here and could not be installed (apt-get install postgresql): its tests are skipped"


def programs() -> Path:
    """The folder of initdb and pg_ctl, of the newest version; the test is skipped where there is none."""
    found = sorted(PLACES.glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        pytest.skip(MISSING)
    return (found[-1] if found else Path(on_path)).parent


def somebody() -> dict[str, Any]:
    """Options of subprocess that make a process somebody else's than root's."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
        except KeyError:
            continue
    pytest.skip("no user postgres or nobody to start PostgreSQL as: its tests are skipped")


@contextmanager
def server() -> Iterator[str]:
    """URL of an empty database, as SQLAlchemy takes it."""
    binaries, other = programs(), somebody()
    folder = Path(tempfile.mkdtemp(prefix="prunedm-postgres-"))
    try:
        if other:
            shutil.chown(folder, other["user"], other["group"])
        options = {**other, "cwd": folder, "check": True, "capture_output": True, "text": True}
        data = folder / "data"
        common = ["-D", str(data), "-U", "prunedm", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run([binaries / "initdb", *common], **options)
        port = browser.free_port()
        settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        begin = [binaries / "pg_ctl", "-D", data, "-w", "-t", "120", "-l", folder / "log", "-o", settings, "start"]
        subprocess.run(begin, **options)
        try:
            yield f"postgresql+psycopg://prunedm@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([binaries / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"], **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
