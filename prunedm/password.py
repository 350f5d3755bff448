"""The password of a lab that is shared on the network, kept as an argon2 hash in a file of the owner's alone.

It lies outside the runs folder (``$PRUNEDM_PASSWORD_FILE``, else ``~/.config/prunedm/password``, mode 0600), and the
password itself is written nowhere.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

ENV = "PRUNEDM_PASSWORD_FILE"
SHORTEST, LONGEST = 10, 200  # characters
LARGEST_FILE = 1000  # bytes of a hash file
SET_ONE = "set one with: python -m prunedm lab --set-password"


class PasswordError(ValueError):
    """No password that can be used, in one line."""


def path() -> Path:
    """Where the hash is kept (it may not exist yet)."""
    given = os.environ.get(ENV)
    return (Path(given) if given else Path.home() / ".config" / "prunedm" / "password").expanduser().absolute()


def store(text: str, runs_dir: Path) -> Path:
    """Keep the hash of a password; PasswordError for a short one, or where the file would lie among the runs."""
    from argon2 import PasswordHasher

    if not SHORTEST <= len(text) <= LONGEST:
        raise PasswordError(f"a password of {len(text)} characters: {SHORTEST} to {LONGEST} are needed; use some words")
    file = path()
    if file.resolve().is_relative_to(runs_dir.resolve()):
        raise PasswordError(f"{file} lies in the runs folder; name another place in ${ENV}")
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = file.with_name(f".{file.name}.part")
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # no moment in which others may read it
    with os.fdopen(handle, "w", encoding="ascii") as out:
        out.write(PasswordHasher().hash(text) + "\n")
    part.replace(file)
    return file


def read() -> str:
    """The hash; PasswordError where there is none, or others may read or write its file."""
    from argon2 import extract_parameters
    from argon2.exceptions import InvalidHashError

    file = path()
    if not os.path.lexists(file):
        raise PasswordError(f"no password is set ({file} is not there); {SET_ONE}")
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
        with os.fdopen(handle, "rb") as source:
            found = os.fstat(source.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
                raise PasswordError(f"{file} must be a file that you alone may read (chmod 600); or {SET_ONE}")
            text = source.read(LARGEST_FILE).decode("ascii").strip()
        extract_parameters(text)
    except (OSError, UnicodeDecodeError, InvalidHashError) as error:
        raise PasswordError(f"{file} holds no password hash ({error.__class__.__name__}); {SET_ONE}") from error
    return text


def matches(known: str, given: str) -> bool:
    """Whether ``given`` is the password of this hash, in a time that does not depend on how much of it is right."""
    from argon2 import PasswordHasher
    from argon2.exceptions import InvalidHashError, VerificationError

    if len(given) > LONGEST:
        return False
    try:
        return PasswordHasher().verify(known, given)
    except (VerificationError, InvalidHashError):
        return False
