"""The soak's accounting: what a server holds is looked at around real jobs, and growth is told."""

import importlib.util
import sys

import pytest
from apptest import ROOT


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("bench_soak", ROOT / "benchmarks" / "soak.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_growth_is_percent_above_the_start(soak):
    start = soak.Held(20, 40, 500.0)
    assert soak.Held(21, 50, 450.0).growth(start) == pytest.approx({"threads": 5, "files": 25, "memory": -10})


@pytest.mark.slow
def test_a_soak_of_three_jobs_is_counted(soak, micro, monkeypatch):
    made, looks = [], []
    of_run = soak.waiting_run
    monkeypatch.setattr(soak, "waiting_run", lambda *given: made.append(of_run(*given)) or made[-1])
    start, end = soak.measure_soak(micro(), 3, 1, lambda number, held: looks.append((number, held)))
    assert looks == [(0, start), (3, end)]
    assert [run.state().status for run in made] == ["stopped", *["done"] * 4], "one to open the page, one to warm up"
    assert all(held.threads > 2 and held.files > 2 and held.memory > 50 for held in (start, end))
    assert end.threads <= start.threads + 1 and end.files <= start.files + 2, "a job leaves none behind"
