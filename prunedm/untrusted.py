"""Files and texts that others made: read within bounds, and said on one line that a terminal can show."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

MIB = 2**20
LARGEST_TEXT = 4 * MIB  # of a config or a recipe
LARGEST_HEADER = 16 * MIB  # of a safetensors file


class UntrustedError(ValueError):
    """A file that is too large, torn or of another kind, in one line."""


def one_line(text: object, most: int = 200) -> str:
    """White space as single blanks, what cannot be printed as ``\\x1b``, cut to ``most`` characters."""
    folded = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in folded[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def shown(value: object, most: int = 80) -> str:
    """A value of whatever size as its ``repr`` begins; big ones are not spelt out for it."""
    if isinstance(value, str | bytes):
        return (
            one_line(repr(value[:most]), most + 2) if len(value) <= most else one_line(f"{value[:most]!r}…", most + 3)
        )
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | tuple | set | dict):
        return f"a {type(value).__name__} of {len(value)}" if _is_large(value) else one_line(repr(value), most)
    return one_line(repr(value), most)


def _is_large(value: Any) -> bool:
    """Whether a container holds more than eight plain things; others of them may be of any size."""
    inside = list(value.values()) if isinstance(value, dict) else value
    return len(inside) > 8 or not all(isinstance(x, str | float | bool | None) or type(x) is int for x in inside)


def _open(path: Path) -> BinaryIO:
    """A regular file, or OSError; a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise UntrustedError("it is no regular file")
    return path.open("rb")


def read_text(path: Path, most: int = LARGEST_TEXT) -> str:
    """A text in UTF-8. OSError, or ValueError in one line for what is larger or no text."""
    with _open(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UntrustedError(f"it has more than {most / MIB:.0f} MiB")
    return content.decode("utf-8")


def read_json(path: Path, most: int = LARGEST_TEXT) -> Any:
    """JSON of a bounded size and depth. OSError, or ValueError."""
    return parse_json(read_text(path, most))


def read_table(path: Path, most: int = LARGEST_TEXT) -> dict[str, Any]:
    """:func:`read_json` of an object. OSError, or ValueError."""
    found = read_json(path, most)
    if not isinstance(found, dict):
        raise UntrustedError("it holds no table")
    return found


def parse_json(text: str | bytes) -> Any:
    """JSON; ValueError where it is none or is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UntrustedError("it is nested too deep") from error


def read_header(path: Path) -> dict[str, Any]:
    """A safetensors header, of a bounded size and one that the file can hold. OSError, or ValueError in one line."""
    with _open(path) as file:
        size, start = path.stat().st_size, file.read(9)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 9 or start[8:] != b"{" or length + 8 > size:
            raise UntrustedError(f"{path.name} is no safetensors file, or torn; save the model again")
        if length > LARGEST_HEADER:
            raise UntrustedError(
                f"{path.name} has a header of {length / MIB:,.0f} MiB; {LARGEST_HEADER // MIB} are allowed"
            )
        content = start[8:] + file.read(length - 1)
    found = parse_json(content)
    if not isinstance(found, dict):
        raise UntrustedError(f"{path.name} has a header that is no table; save the model again")
    return found


def require_header(path: Path) -> None:
    """:func:`read_header`'s bounds, before safetensors itself reads the header: it would take any of 100 MB."""
    with _open(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if LARGEST_HEADER < length <= path.stat().st_size - 8:
        raise UntrustedError(
            f"{path.name} has a header of {length / MIB:,.0f} MiB; {LARGEST_HEADER // MIB} are allowed"
        )
