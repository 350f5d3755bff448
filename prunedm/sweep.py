"""A sweep: many runs of one recipe with other values, kept as an Optuna study in a database.

::

    runs/sweeps/<name>/study.db     unless another database is given; trials are ordinary runs beside it

Workers (sweep_worker.py) of any number of processes and machines share a study. What pages show of one is read
here. Optuna is imported late: a page that shows no sweep does not wait for it.
"""

from __future__ import annotations

import datetime
import json
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import comparison, store, sweep_trials
from .files import require_known
from .records import ACTIVE
from .redact import SECRET_NAME
from .sweep_spec import Sweep, SweepError
from .sweep_spec import build as build_spec
from .sweep_trials import CAUSE, FIGURES, HIDDEN, SECONDS

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage

FOLDER = "sweeps"  # in the runs folder; it holds no recipe, so that no list takes it for a run
DATABASE = "study.db"
HEARTBEAT, GRACE = 15, 90  # seconds: between signs of life of a worker, and without one until it counts as killed
SQLITE_TIMEOUT = 60.0  # seconds to wait for a database that another worker is writing
FEWEST = 10  # finished trials before importances mean anything
BEST_SHARE = 0.25  # importances: what sets the best quarter of the trials apart

# Notes at a study, in its user attributes.
SPEC, TRIALS, STOP_ASKED, VERSION = "sweep", "trials", "stop_asked", "schema"
SCHEMA = 1  # of the notes; studies without one are of this version too


# --- storage -----------------------------------------------------------------------------------
def folder(runs_dir: Path, name: str) -> Path:
    """Where a sweep keeps its own files."""
    return runs_dir / FOLDER / name


def default_storage(runs_dir: Path, name: str) -> str:
    """URL of the sweep's own SQLite file."""
    return f"sqlite:///{(folder(runs_dir, name) / DATABASE).absolute()}"


def names(runs_dir: Path) -> list[str]:
    """Sweeps of this runs folder, the latest used first."""
    found = [path for path in (runs_dir / FOLDER).glob(f"*/{DATABASE}") if store.RUN_ID.fullmatch(path.parent.name)]
    return [path.parent.name for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)]


def shown(url: str) -> str:
    """A storage URL without its password, also one among its settings (``?password=``)."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
        hidden = {key: "hidden" for key in parsed.query if SECRET_NAME.search(key)}
        return parsed.update_query_dict(hidden).render_as_string(hide_password=True)
    except ArgumentError:
        return url.partition("://")[0] + "://..." if "://" in url else url


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite URL; None for other databases."""
    from sqlalchemy.engine import make_url

    parsed = make_url(url)
    return Path(parsed.database or "") if parsed.get_backend_name() == "sqlite" else None


def connect(url: str, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> RDBStorage:
    """Open a database, and make Optuna's tables in an empty one. :class:`SweepError` where it cannot be."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what becomes of trials is noted and shown by the sweep
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # it calls heartbeats so
    try:
        path = sqlite_file(url)
        if path is not None and path.name in ("", ":memory:"):
            raise SweepError(f"storage {url} forgets what it is told; name a file, such as sqlite:///sweep.db")
        if path is not None and not path.parent.is_dir():
            raise SweepError(f"storage {url} is in a folder that is not there; make {path.parent} or name another file")
        options = {"pool_pre_ping": True} if path is None else {"connect_args": {"timeout": SQLITE_TIMEOUT}}
        with locked(url):
            return optuna.storages.RDBStorage(url, options, heartbeat_interval=heartbeat, grace_period=grace)
    except (SQLAlchemyError, ImportError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:160]
        raise SweepError(
            f"storage {shown(url)} cannot be opened ({text}); give a database's URL, such as sqlite:///sweep.db or "
            "postgresql+psycopg://user@host/name, and install its driver"
        ) from error


@contextmanager
def locked(url: str) -> Iterator[None]:
    """One worker at a time, where the database is a SQLite file: SQLite locks no rows, so that two workers could
    take the same waiting trial. Other databases lock rows themselves."""
    path = sqlite_file(url)
    if path is None:
        yield
        return
    from filelock import FileLock

    with FileLock(path.with_name(path.name + ".lock"), timeout=SQLITE_TIMEOUT):
        yield


# --- studies -----------------------------------------------------------------------------------
def start(spec: Sweep, runs_dir: Path, storage: str | None = None, trials: int | None = None, **beat: int) -> Study:
    """The sweep's study, ready for a worker: made now, or gone on with where it is there already.

    trials: how many in all, where that is not what the specification says. beat: as of :func:`connect`.
    :class:`SweepError` where the study is that of another specification.
    """
    import optuna

    if storage is None:
        store.check_writable(folder(runs_dir, spec.name))
    url = storage or default_storage(runs_dir, spec.name)
    study = optuna.create_study(
        study_name=spec.name,
        storage=connect(url, **beat),
        directions=["minimize"] * len(spec.objectives.figures),
        load_if_exists=True,
    )
    _require_known(study)
    known = study.user_attrs.get(SPEC)
    if known is None:
        study.set_user_attr(VERSION, SCHEMA)
        study.set_user_attr(SPEC, spec.model_dump(mode="json"))
    else:
        _require_same(spec, build_spec(known))
    if trials is not None or known is None or known["trials"] != spec.trials:
        study.set_user_attr(TRIALS, trials or spec.trials)
    return _equipped(study, spec)


def join(spec: Sweep, runs_dir: Path, storage: str | None = None, patience: float = 60.0, **beat: int) -> Study:
    """The study that another process started, for one more worker; waits a while for it to appear."""
    deadline = time.monotonic() + patience
    while True:
        try:
            study = load(spec.name, runs_dir, storage, **beat)
            _require_same(spec, spec_of(study))
            return _equipped(study, spec)
        except MissingError:
            if time.monotonic() > deadline:
                raise
            time.sleep(min(1.0, patience / 10))


def load(name: str, runs_dir: Path, storage: str | None = None, **beat: int) -> Study:
    """A study to look at. :class:`SweepError` where there is none of this name."""
    import optuna

    url = storage or default_storage(runs_dir, name)
    missing = MissingError(f"no sweep {name!r} in {shown(url)}; start it: python -m prunedm sweep SWEEP.yaml")
    if not store.RUN_ID.fullmatch(name) or (storage is None and not (folder(runs_dir, name) / DATABASE).is_file()):
        raise missing
    try:
        study = optuna.load_study(study_name=name, storage=connect(url, **beat))
    except KeyError:
        raise missing from None
    if SPEC not in study.user_attrs:
        raise MissingError(f"study {name!r} in {shown(url)} is not a sweep, or not yet; give the name of a sweep")
    _require_known(study)
    return study


def _require_known(study: Study) -> None:
    """:class:`SweepError` for a sweep of a later version: nothing of it is read or changed."""
    try:
        require_known(f"sweep {study.study_name}", study.user_attrs.get(VERSION, SCHEMA), SCHEMA)
    except store.StoreError as error:
        raise SweepError(str(error)) from None


class MissingError(SweepError):
    """There is no such sweep (yet)."""


def spec_of(study: Study) -> Sweep:
    """The specification that a study was started with."""
    return _spec_of_text(json.dumps(study.user_attrs[SPEC]))


@lru_cache(maxsize=16)
def _spec_of_text(text: str) -> Sweep:
    return build_spec(json.loads(text))


def total(study: Study) -> int:
    """How many trials there are to be, on all machines together."""
    spec = spec_of(study).model_copy(update={"trials": study.user_attrs[TRIALS]})
    return spec.total


def request_stop(study: Study, runs_dir: Path) -> None:
    """Ask all workers to end after the step at hand; the sweep can be gone on with."""
    study.set_user_attr(STOP_ASKED, uuid.uuid4().hex)
    for row in trials(study):
        if row["state"] == "running" and row["run"]:
            run = store.Run(runs_dir / row["run"])
            if run.folder.is_dir() and run.state().status in ACTIVE:
                run.request_stop()


def last_stop(study: Study) -> Any:
    """What tells the last request to stop from the ones before it, on whichever machine's clock; None for none yet."""
    return study.user_attrs.get(STOP_ASKED)


def _require_same(spec: Sweep, known: Sweep) -> None:
    ours, theirs = spec.model_dump(), known.model_dump()
    other = [name for name in ours if name != "trials" and ours[name] != theirs[name]]
    if other:
        raise SweepError(
            f"sweep {spec.name} was started with other {', '.join(other)}; go on with what it was started with, or "
            "give this one another name"
        )


def _equipped(study: Study, spec: Sweep) -> Study:
    from . import sweep_sampler

    study.sampler, study.pruner = sweep_sampler.Slots(spec, study), sweep_sampler.pruner(spec)
    return study


# --- what pages and commands show --------------------------------------------------------------
def trials(study: Study) -> list[dict[str, Any]]:
    """A row for each trial: number, state, params, objectives, run, seconds, cause, figures.

    state: waiting, running, complete, pruned, failed, or interrupted (to be gone on with). objectives: name to
    value, of complete trials alone. seconds: spent on it so far; None before it began.
    """
    objectives = list(spec_of(study).objectives.figures)
    found = study.get_trials(deepcopy=False)
    states = sweep_trials.outcomes(found)
    return [_row(one, states[one.number], objectives) for one in found if states[one.number] not in HIDDEN]


def _row(trial: Any, state: str, objectives: list[str]) -> dict[str, Any]:
    notes = trial.user_attrs
    values = trial.values if state == "complete" else None
    return {
        "number": trial.number,
        "state": state,
        "params": dict(trial.params),
        "objectives": dict(zip(objectives, values or [None] * len(objectives))),
        "run": sweep_trials.run_of(trial),
        "seconds": _seconds(trial),
        "cause": sweep_trials.cause(trial) if state in ("failed", "pruned") else notes.get(CAUSE, ""),
        "figures": notes.get(FIGURES, {}),
    }


def _seconds(trial: Any) -> float | None:
    if SECONDS in trial.user_attrs:
        return trial.user_attrs[SECONDS]
    if trial.datetime_start is None:
        return None
    return ((trial.datetime_complete or datetime.datetime.now()) - trial.datetime_start).total_seconds()


def front(study: Study) -> list[int]:
    """Numbers of the trials that no other one beats: smaller in one objective and no larger in the other."""
    done = [row for row in trials(study) if row["state"] == "complete"]
    points = [(*row["objectives"].values(), 0.0)[:2] for row in done]
    return [row["number"] for row, kept in zip(done, comparison.front(points)) if kept]


def importances(study: Study, objective: str | None = None) -> dict[str, float]:
    """How much each field decides whether a trial is among the best quarter in an objective; the largest first.

    objective: its name; None: the first. The shares add up to 1. By PED-ANOVA (arXiv 2304.10255).
    :class:`SweepError` where too few trials are complete or there is no such objective.
    """
    from optuna import importance

    known = list(spec_of(study).objectives.figures)
    if objective is not None and objective not in known:
        raise SweepError(f"objective {objective!r} is none of this sweep; use {' or '.join(known)}")
    place = 0 if objective is None else known.index(objective)
    done = sum(row["state"] == "complete" for row in trials(study))
    if done < FEWEST:
        raise SweepError(f"importances need {FEWEST} complete trials and {done} are there; let more trials run")
    evaluator = importance.PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a small target is taken for a good one, as it is here
        return importance.get_param_importances(study, evaluator=evaluator, target=lambda one: one.values[place])


def progress(study: Study) -> dict[str, Any]:
    """How far a sweep is: ``of`` trials, ``finished`` ones, how many in each state, and seconds to its end.

    eta: None until a trial is complete.
    """
    rows, of = trials(study), total(study)
    count = {state: sum(row["state"] == state for row in rows) for state in ("complete", "pruned", "failed")}
    finished, running = sum(count.values()), sum(row["state"] == "running" for row in rows)
    times = [row["seconds"] for row in rows if row["state"] in count and row["seconds"] is not None]
    eta = sum(times) / len(times) * max(0, of - finished) / max(1, running) if count["complete"] else None
    return {"of": of, "finished": finished, "running": running} | count | {"eta": eta}
