"""What is private in a text, taken out of it: for the server's log and the support bundle.

Gone are secrets (values of environment variables whose names say so, tokens of known forms, passwords in settings and
addresses), names of users and of this machine, e-mail addresses, and where things lie on its disk: paths begin at
``<runs>``, ``<lab>`` or ``<python>``, and of others, those of a home (``~``) too, only the last part is left.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

SECRET = r"(?:token|secret|passw(?:or)?d|passphrase|api_?key|access_?key|private_?key|credential|authorization)"
SECRET_NAME = re.compile(rf"{SECRET}s?$|{SECRET}_", re.IGNORECASE)
SHORTEST = 4  # characters of a secret that is worth hiding; shorter ones stand in half of all words
LAB = Path(__file__).resolve().parents[1]
PATH_ENDS = r"\n\t\"'`<>|:,;()\[\]{}"  # characters that end a folder's name in running text; a space may be part of it
FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(?:hf|ghp|gho|ghs|glpat|github_pat|sk|pk|xox[abp]|wandb_v1)[_-][A-Za-z0-9_-]{16,}"), "<secret>"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), "<secret>"),
    (re.compile(r"\bBearer\s+[\w.~+/=-]{8,}", re.IGNORECASE), "Bearer <secret>"),
    (
        re.compile(rf"([\"']?\b\w*{SECRET}s?[\"']?\s*[:=]\s*)(\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}}]+)", re.IGNORECASE),
        r"\1<secret>",
    ),
    (re.compile(r"(\w://)[^/\s@]+@"), r"\1<secret>@"),
    # Tried from the beginning of a word alone: from each of its characters a long one would take its square.
    (re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "<e-mail>"),
)
PARTS = rf"/(?:[^/{PATH_ENDS}]+/)"
OTHER_HOMES = re.compile(rf"/(?:home|Users)/[^/\s{PATH_ENDS}]+")
HOME_PATHS = re.compile(rf"(~|<home>){PARTS}+")
OTHER_PATHS = re.compile(rf"(?<![\w.<>~/:-]){PARTS}+")


class Redactor:
    """Takes out what is private on this machine, as it stands now. ``places``: words for further folders."""

    def __init__(self, places: dict[str, Path] | None = None) -> None:
        self._secrets = _longest_first(
            value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST
        )
        fixed = {"<lab>": LAB, "<python>": Path(sys.prefix), "<base python>": Path(sys.base_prefix), "~": Path.home()}
        found = {spelt: word for word, path in (fixed | (places or {})).items() for spelt in _spellings(path)}
        self._places = [(re.compile(re.escape(p) + r"(?![\w.-])"), found[p]) for p in _longest_first(found)]
        self._names = [(_whole_word(name), word) for word, names in _names().items() for name in _longest_first(names)]

    def text(self, given: str) -> str:
        """Running text, of any number of lines."""
        for secret in self._secrets:
            given = given.replace(secret, "<secret>")
        for form, word in FORMS:
            given = form.sub(word, given)
        for place, word in self._places:
            given = place.sub(word, given)
        given = HOME_PATHS.sub(r"\1/", OTHER_HOMES.sub("<home>", given))
        given = OTHER_PATHS.sub("<path>/", given)
        for name, word in self._names:
            given = name.sub(word, given)
        return given

    def value(self, given: Any) -> Any:
        """JSON: each key and string. A string that is a path is one however many spaces it holds."""
        if isinstance(given, dict):
            return {
                self.text(str(key)): "<secret>" if SECRET_NAME.search(str(key)) and item else self.value(item)
                for key, item in given.items()
            }
        if isinstance(given, list | tuple):
            return [self.value(item) for item in given]
        if not isinstance(given, str):
            return given
        told = self.text(given)
        return self.text(f"<path>/{Path(given).name}") if told.startswith("<path>/") and "\n" not in given else told


def _spellings(path: Path) -> set[str]:
    """A folder as it is given and as it is without links; never the root of all."""
    return {spelt for spelt in (str(path.absolute()), os.path.realpath(path)) if spelt.count("/") and len(spelt) > 1}


def _names() -> dict[str, set[str]]:
    """Names of whoever works here, and of the machine."""
    host = {socket.gethostname(), platform.node(), os.environ.get("HOSTNAME", "")}
    users = {os.environ.get(key, "") for key in ("USER", "LOGNAME", "USERNAME")} | {Path.home().name}
    with suppress(OSError, KeyError):  # a user without a name
        users.add(getpass.getuser())
    return {
        "<host>": {name for name in host | {name.partition(".")[0] for name in host} if name not in ("", "localhost")},
        "<user>": {name for name in users if name},
    }


def _whole_word(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", re.IGNORECASE)


def _longest_first(words: Iterable[str]) -> list[str]:
    return sorted(set(words), key=len, reverse=True)
