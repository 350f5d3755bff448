"""What goes wrong inside the work of a run: the cause in words, the fields to change, and a queue that goes on."""

import errno
import weakref

import pytest
import torch
from apptest import wait_for
from test_app import open_page, said

from app import parts
from prunedm import failure, latency, learn, store, structured, training
from prunedm.jobs import Jobs
from prunedm.recipe import flatten

PLACES = {  # stage: what is called in it
    "prune": (structured, "prune"),
    "finetune": (training.DenseLoss, "step"),
    "mask": (learn.GumbelMasks, "step"),
    "evaluate": (latency, "benchmark"),
}


def real_allocation():
    torch.empty(10**15)  # more than any machine's address space


def not_a_number():
    return {"loss": float("nan")}


def raising(kind, *given):
    def do():
        raise kind(*given)  # anew: an error that the test holds would hold the run's memory by its traceback

    return do


MEMORY = "out of memory; halve data.batch_size"
FAULTS = [  # stage, what happens in it, words of the cause, the fields to change
    ("finetune", not_a_number, "the loss became nan at step 1 of finetune; lower train.lr", {"train.lr": 6.7e-05}),
    ("mask", not_a_number, "the loss became nan at step 1 of mask; lower mask.lr", {"mask.lr": None}),
    ("finetune", real_allocation, MEMORY, {"data.batch_size": 4}),
    ("mask", raising(torch.OutOfMemoryError, "CUDA out of memory. Tried 2 GiB"), MEMORY, {"data.batch_size": 4}),
    ("mask", raising(MemoryError), MEMORY, {"data.batch_size": 4}),
    ("evaluate", real_allocation, "out of memory; free some memory, or use a device with more, and resume", {}),
    ("prune", raising(IndexError, "a\nlong\nstory"), "IndexError: a long story", {}),
    ("mask", raising(KeyError, "weight"), "KeyError: 'weight'", {}),
    ("evaluate", raising(SystemExit, 3), "SystemExit: 3", {}),
]  # fmt: skip


class Held:
    """Stands for what a step has in its hands: whoever holds the step's error holds this too."""


@pytest.fixture
def broken(monkeypatch):
    """Breaks the named stage of the first run that comes to it; returns the weak references of what it held."""

    def breaks(stage, do):
        place, name = PLACES[stage]
        plain, held = getattr(place, name), []

        def hurt(*given, **named):
            if held:
                return plain(*given, **named)
            local = Held()  # which the traceback of the fault holds
            model = next(iter(given[0].values())) if isinstance(given[0], dict) else given[0]
            held.extend([weakref.ref(local), weakref.ref(model)])
            return do()

        monkeypatch.setattr(place, name, hurt)
        return held

    return breaks


def ended(run):
    wait_for(lambda: run.state().status in ("failed", "done"))
    return run.state()


@pytest.mark.in_turn(5)
@pytest.mark.parametrize(("stage", "do", "cause", "changes"), FAULTS)
def test_a_fault_in_a_worker_is_told_and_the_queue_goes_on(runs, micro, broken, stage, do, cause, changes):
    held = broken(stage, do)
    jobs = Jobs(runs)
    first, second = jobs.submit(micro(name="first")), jobs.submit(micro(name="second"))
    state = ended(first)
    assert state.status == "failed" and state.stage == stage and "\n" not in state.error
    assert cause in state.error, state.error
    assert state.remedy.keys() == changes.keys()
    assert all(value in (None, pytest.approx(state.remedy[field], rel=0.01)) for field, value in changes.items())
    assert "Traceback" in first.log_path.read_text(), "the whole story is in the log"
    assert ended(second).status == "done", second.state().error
    assert held and not any(reference() for reference in held), "the failed run's memory went back"
    prefilled(first, state.remedy)
    jobs.resume(first)
    assert ended(first).status == "done", "what was finished before the fault was kept"


def prefilled(run, changes):
    """Monitor says the cause and offers the remedy, in one press, as Launch's form filled in."""
    app = open_page("monitor", run=run.id)
    assert parts.plain(run.state().error.split(";")[0]) in said(app)
    buttons = [button for button in app.button if button.label.startswith("Try again with")]
    assert len(buttons) == bool(changes)
    for field, value in changes.items():
        assert f"{field} = {value:g}" in buttons[0].label
        now = flatten(run.recipe().model_dump())[field]
        assert value != now and (now is None or value < now)
        buttons[0].click().run()
        app.switch_page("../pages/launch.py").run()
        assert not app.exception
        assert float(app.session_state[f"recipe.{field}"]) == pytest.approx(value)
    assert len(store.all_runs(run.folder.parent)) == 2, "nothing starts by itself"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("MPS backend out of memory (MPS: 9 GiB)")]
)
def test_missing_memory_is_known_by_whatever_meets_it(error):
    assert failure.plain_words(error, "data.batch_size").startswith(MEMORY)
