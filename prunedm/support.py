"""The support bundle: what someone who helps needs to see of an installation and of some runs, in one zip.

Held back are images, samples, weights, masks, notes and tags; what is private in the rest is taken out (redact.py).
Every text is cut to its end, so that the bundle stays small however long the runs.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import environment, files, logs, store, strict_yaml
from .jsonl import last_records
from .redact import LAB, Redactor
from .store import Run, StoreError

RUNS = 5  # the newest, where none are named
LINES, LOG_TAIL, FILE_TAIL = 200, 200_000, 400_000  # lines, and bytes, of the end of a file
CONFIG = LAB / "app" / ".streamlit" / "config.toml"
TAILS = ("metrics.jsonl", "events.jsonl", store.SYSTEM)
NOT_TOLD = ("host",)  # of a run's state
PICTURE_NAMES = re.compile(r"(image skipped: ).*")
ABOUT = {
    "environment.json": "this machine, versions, the checks of `prunedm doctor`, settings named PRUNEDM_*",
    "packages.txt": "every installed Python package with its version",
    "lab-config.toml": "the lab's settings",
    "server-log.txt": "the end of the server's log",
    "recipe.yaml": "what the run was asked to do",
    "state.json": "how far it came, and its error",
    "log.txt": "the end of its log",
    "metrics.jsonl": "its last step records",
    "events.jsonl": "its last events",
    "system.jsonl": "the last figures of processor, memory and GPU",
    "files.json": "names and bytes of its files",
    "problem.txt": "why it cannot be read",
}
HEAD = """What `python -m prunedm doctor --bundle` collected, for whoever helps.

No images, samples, weights, masks, notes or tags are in here. Secrets, names of users and of this machine, e-mail
addresses and places on its disk were taken out: <runs>, <lab>, <python> and ~ stand for folders. A recipe, a log or
an error may still say what a run is about: read them before you pass the file on.

"""


def build(runs_dir: Path, run_ids: list[str] | None = None) -> bytes:
    """The zip's content, for the runs named or else the newest five. StoreError for a run that is not there."""
    runs = [store.find(runs_dir, run_id) for run_id in run_ids or []] or store.all_runs(runs_dir)[:RUNS]
    redactor = Redactor({"<runs>": runs_dir})
    found = _installation(runs_dir, redactor)
    for run in runs:
        place = f"runs/{re.sub('[<>]', '', redactor.text(run.id))}"
        found |= {f"{place}/{name}": text for name, text in _run(run, redactor).items()}
    told = [f"{name}: {ABOUT[name.rpartition('/')[2]]} ({len(text):,} characters)\n" for name, text in found.items()]
    return _zip({"README.txt": HEAD + "".join(told)} | found)


def write(runs_dir: Path, run_ids: list[str], out: Path) -> list[str]:
    """Write a new file; names of what it holds. StoreError when the file is there already."""
    if out.exists():
        raise StoreError(f"{out} is there already; name another file with --out")
    content = build(runs_dir, run_ids)
    try:
        with out.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise StoreError(f"{out} is there already; name another file with --out") from None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.namelist()


def file_name() -> str:
    """Of a bundle made now."""
    return f"prunedm-support-{time.strftime('%Y%m%d-%H%M%S')}.zip"


def _zip(texts: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            archive.writestr(name, text.encode("utf-8", "replace"))
    return buffer.getvalue()


def _installation(runs_dir: Path, redactor: Redactor) -> dict[str, str]:
    versions = environment.versions()
    about = {
        "machine": environment.machine() if versions["torch"] != "missing" else {},
        "versions": versions,
        "checks": [vars(check) for check in environment.checks(runs_dir)],
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("PRUNEDM_")},
    }
    found = {
        "environment.json": _json(redactor.value(about)),
        "packages.txt": redactor.text("\n".join(packages())),
        "lab-config.toml": redactor.text(_told(redactor, lambda: CONFIG.read_text(encoding="utf-8"))),
    }
    if said := logs.tail(runs_dir / logs.SERVER, LOG_TAIL):
        found["server-log.txt"] = redactor.text(said)
    return found


def packages() -> list[str]:
    """``name==version`` of every installed package."""
    found = {(dist.metadata["Name"] or "unnamed", dist.version) for dist in importlib.metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found, key=lambda pair: pair[0].lower())]


def _run(run: Run, redactor: Redactor) -> dict[str, str]:
    """One run's texts. A folder with links is not read: they may lead to what is none of the run's."""
    try:
        files.require_own(run.folder)
    except (StoreError, OSError) as error:
        return {"problem.txt": redactor.text(str(error))}
    found = {
        "recipe.yaml": _told(redactor, lambda: _recipe(run, redactor)),
        "state.json": _told(redactor, lambda: _state(run, redactor)),
        "log.txt": redactor.text(PICTURE_NAMES.sub(r"\1<name>", logs.tail(run.log_path, LOG_TAIL))),
    }
    found |= {name: _told(redactor, lambda name=name: _last_lines(run.folder / name, redactor)) for name in TAILS}
    found["files.json"] = _told(redactor, lambda: _json(redactor.value(_files(run))))
    return {name: text for name, text in found.items() if text}


def _told(redactor: Redactor, read: Callable[[], str]) -> str:
    """What ``read`` gives; of a file that is damaged or gone, that it is."""
    try:
        return read()
    except (OSError, *strict_yaml.FAULTS) as error:  # ValueError is one of them
        return f"could not be read: {redactor.text(str(error))[:1000]}\n"


def _recipe(run: Run, redactor: Redactor) -> str:
    raw = strict_yaml.load((run.folder / "recipe.yaml").read_text(encoding="utf-8"))
    return strict_yaml.dump(redactor.value(raw))


def _state(run: Run, redactor: Redactor) -> str:
    """As it lies there, whatever version wrote it; a list or a number is told as it is too."""
    raw = store.read_json(run.folder / "state.json")
    kept = {key: value for key, value in raw.items() if key not in NOT_TOLD} if isinstance(raw, dict) else raw
    return _json(redactor.value(kept))


def _last_lines(path: Path, redactor: Redactor) -> str:
    """The last records of a file of JSON lines; empty where there is none."""
    records = last_records(path, LINES, FILE_TAIL)
    return "".join(json.dumps(redactor.value(record), ensure_ascii=False) + "\n" for record in records)


def _files(run: Run) -> dict[str, int]:
    """Path in the run's folder to bytes; pictures and weights are only counted in."""
    found = sorted(path for path in run.folder.rglob("*") if path.is_file())
    return {str(path.relative_to(run.folder)): path.stat().st_size for path in found}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
