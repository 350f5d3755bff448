"""The sampler of the machine: right figures, absent ones absent, a small file, and never a failed run."""

import itertools
import json
import re
import sys
import threading
import time
import types

import psutil
import pytest
from test_app import open_page, said

from app import parts, system_views
from prunedm import charts, jsonl, pipeline, store, system
from prunedm.recipe import Recipe

GIB = 2**30


@pytest.fixture
def run(tmp_path):
    return store.create(tmp_path, Recipe())


def sample(at, **changes):
    return {
        "time": at, "cpu": 150.0, "memory": GIB, "machine_cpu": 90.0, "cores": 2,
        "machine_memory": 4 * GIB, "machine_memory_total": 16 * GIB,
    } | changes  # fmt: skip


class FakeError(Exception):
    pass


def fake_nvml(count=1, power=True, broken=False):
    """A module with the functions that are used of nvidia-ml-py."""
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError, nvml.NVML_TEMPERATURE_GPU = FakeError, 0

    def init():
        if broken:
            raise FakeError("Driver Not Loaded")

    def power_usage(handle):
        if not power:
            raise FakeError("Not Supported")
        return 410_500 + handle

    nvml.nvmlInit, nvml.nvmlDeviceGetCount = init, lambda: count
    nvml.nvmlDeviceGetHandleByIndex = lambda i: i
    nvml.nvmlDeviceGetName = lambda handle: b"NVIDIA H200" if handle else "NVIDIA H200"
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: types.SimpleNamespace(gpu=87, memory=30)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(used=12 * GIB, total=140 * GIB)
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 54
    nvml.nvmlDeviceGetPowerUsage = power_usage
    return nvml


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises ImportError


def test_the_figures_are_psutils(no_nvml):
    """Each figure lies between two looks of psutil's own; a busy machine may change much between them."""
    probe, own = system.Probe(), psutil.Process()
    before, memory = own.cpu_times(), psutil.virtual_memory()
    began, busy = time.time(), time.monotonic() + 1.0
    while time.monotonic() < busy:
        pass
    found, after, again = probe.look(), own.cpu_times(), psutil.virtual_memory()
    most = 100 * (after.user + after.system - before.user - before.system + 0.1)  # of a second, and it took one or more
    assert 5 < found["cpu"] <= most
    assert found["memory"] == pytest.approx(own.memory_info().rss, rel=0.05)
    assert 0 < found["machine_cpu"] <= 100 and found["cores"] == psutil.cpu_count()
    assert found["machine_memory_total"] == memory.total
    used = [one.total - one.available for one in (memory, again)]
    assert 0.7 * min(used) <= found["machine_memory"] <= 1.3 * max(used)
    assert began - 0.001 <= found["time"] <= time.time() + 0.001, "in milliseconds"


def test_a_gpu_that_is_not_there_is_absent_and_not_zero(no_nvml, monkeypatch):
    assert "gpus" not in system.Probe().look()
    assert "nvidia-ml-py is not installed" in system.Gpus().problem
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(broken=True))
    assert "gpus" not in system.Probe().look() and "Driver Not Loaded" in system.Gpus().problem
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(count=0))
    assert "gpus" not in system.Probe().look()


def test_gpus_are_told_through_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(count=2))
    first, second = system.Probe().look()["gpus"]
    assert first == {
        "index": 0, "name": "NVIDIA H200", "utilisation": 87, "memory": 12 * GIB, "memory_total": 140 * GIB,
        "temperature": 54, "power": 410.5,
    }  # fmt: skip
    assert (second["index"], second["name"]) == (1, "NVIDIA H200")
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(power=False))
    (gpu,) = system.Probe().look()["gpus"]
    assert gpu["power"] is None and gpu["utilisation"] == 87


def test_a_sampler_appends_while_it_runs(run):
    store.write_atomic(run.folder / store.SYSTEM, (json.dumps(sample(1.0)) + '\n{"time": 2, "cp').encode())
    sampler = system.Sampler(run, every=0.05)
    sampler.start()
    until(lambda: len(system.records(run)) >= 4)
    sampler.stop()
    found = system.records(run)
    assert found[0] == sample(1.0), "a resumed run appends, also after a line that a crash tore"
    times = [record["time"] for record in found]
    assert times == sorted(times)
    assert not run.log_path.exists()


def test_a_sampler_that_rests_ends_at_once(run):
    sampler = system.Sampler(run, every=3600)
    sampler.start()
    sampler.stop()
    sampler.join(60)
    assert not sampler.is_alive()


def test_thinning_keeps_the_order_and_an_even_spacing(run):
    records = [sample(2.0 * i) for i in range(5000)]
    write(run, records)
    left = system.thin(run)
    kept = system.records(run)
    assert left == len(kept) == 2500 and [r["time"] for r in kept] == [4.0 * i for i in range(2500)]
    write(run, kept + [sample(10_000 + 2.0 * i) for i in range(2500)])
    assert system.thin(run) <= 2500
    times = [r["time"] for r in system.records(run)]
    gaps = {b - a for a, b in itertools.pairwise(times)}
    assert times == sorted(times) and gaps == {8.0}, "the past and the present lie equally close"
    assert not list(run.folder.glob(".*.part"))


def test_the_file_stays_small_while_it_grows(run):
    sampler = system.Sampler(run, every=0.002, most=20)
    sampler.start()
    lengths, began = [0], time.monotonic()

    def has_been_thinned():
        lengths.append(len(jsonl.read_jsonl(run.folder / store.SYSTEM)))
        return max(lengths) >= 10 and time.monotonic() > began + 2

    until(has_been_thinned)
    sampler.stop()
    assert max(lengths) <= 20
    times = [r["time"] for r in system.records(run)]
    assert times == sorted(times) and times[-1] - times[0] > 0.5, "the first samples are still there"


def test_odd_times_do_not_thin_for_ever(run):
    odd = [*range(30, 0, -1), 1e300, 1e9, 1e300, 5, *range(40)]
    write(run, [sample(float(t)) for t in odd] + [{"time": 1}, [1], sample(float("nan")), sample("x")])
    assert 1 <= system.thin(run, most=10) <= 5


def test_a_run_is_sampled_whatever_becomes_of_it(tmp_path, micro, monkeypatch):
    monkeypatch.setattr(system, "Sampler", quick(system.Sampler))
    run = store.create(tmp_path, micro())
    assert pipeline.execute(run, stop=lambda: len(system.records(run)) > 3) in ("stopped", "done")
    before = len(system.records(run))
    assert before > 3 and "prunedm-system" not in [t.name for t in threading.enumerate()]
    assert pipeline.execute(run) == "done"
    assert len(system.records(run)) > before


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ValueError("x"), psutil.AccessDenied(1)])
def test_a_sampler_that_cannot_write_says_so_once_and_fails_nothing(tmp_path, micro, monkeypatch, fault):
    append, tried = store.Run.append, []

    def full(self, name, records):
        if name == store.SYSTEM:
            tried.append(name)
            raise fault
        append(self, name, records)

    monkeypatch.setattr(system, "Sampler", quick(system.Sampler))
    monkeypatch.setattr(store.Run, "append", full)
    run = store.create(tmp_path, micro(mask={"method": "none"}))
    assert pipeline.execute(run) == "done"
    assert len(tried) > 1 and run.log_path.read_text().count("no system figures") == 1


def test_a_folder_that_is_gone_ends_no_sampler_badly(run):
    import shutil

    sampler = system.Sampler(run, every=0.02)
    shutil.rmtree(run.folder)
    sampler.start()
    time.sleep(0.2)
    assert sampler.is_alive()
    sampler.stop()
    assert not run.folder.exists()


def test_a_run_goes_on_without_a_thread_to_sample(tmp_path, run, monkeypatch):
    monkeypatch.setattr(system.Sampler, "start", raising(RuntimeError("can't start new thread")))
    with system.sampled(run):
        pass


def test_a_sample_costs_next_to_nothing(run, no_nvml):
    probe, count = system.Probe(), 200
    began = time.thread_time()
    for _ in range(count):
        run.append(store.SYSTEM, [probe.look()])
    assert (time.thread_time() - began) / count < 0.003 * system.EVERY, "0.3 % of a core"


# --- What the Monitor shows


def test_running_time_leaves_out_what_lies_between_two_sessions():
    times = [102.0, 104.0, 106.0, 1002.0, 1004.0]
    assert charts.running_minutes(times, [100.0, 1000.0]) == pytest.approx(
        [2 / 60, 4 / 60, 6 / 60, 8 / 60, 10 / 60], abs=1e-4
    )
    assert charts.running_minutes(times[:3], []) == pytest.approx([0, 2 / 60, 4 / 60], abs=1e-4)


def test_figures_show_shares_gibibytes_and_gaps():
    gpu = {"index": 0, "name": "<b>H200</b>", "utilisation": None, "memory": 12 * GIB, "memory_total": 140 * GIB}
    gpu |= {"temperature": 54, "power": None}
    shown = [sample(2.0), sample(4.0, gpus=[gpu]), sample(6.0)]
    seen = system_views.Timeline("v", shown, [0.0, 0.1, 0.2])
    figure, said = system_views.cpu(seen)
    run, machine = figure["data"]
    assert run["y"] == [75.0] * 3 and machine["y"] == [90.0] * 3 and "90 % of the machine's" in said
    figure, said = system_views.memory(seen)
    own, used, total = figure["data"]
    assert (own["y"][0], used["y"][0], total["y"][0]) == (1.0, 4.0, 16.0) and "holds 1.0 GiB" in said
    assert system_views.gpu_names(shown) == {0: "<b>H200</b>"}
    has, ceiling = system_views.gpu(seen, "memory")[0]["data"]
    assert has["name"] == "GPU 0" and has["y"] == [None, 12.0, None] and ceiling["y"] == [None, 140.0, None]
    assert json.dumps([run, has]), "plain enough for the browser"
    assert system_views.gpu_now(gpu) == "GPU 0: 12.0 of 140.0 GiB, 54 °C"
    label, count, told = system_views.gpus_in_words([gpu, gpu | {"index": 1}, gpu | {"name": "L4"}])
    assert (label, count) == (f"GPU, 2 x {parts.plain('<b>H200</b>')}, L4", "3") and "GPU 1: 12.0" in told
    assert "color" in figure["layout"]["modebar"]


@pytest.mark.parametrize("status", ["running", "paused"])
def test_monitor_shows_the_machine_of_an_active_run(runs, status):
    run = store.create(runs, Recipe())
    run.event("started")
    run.claim(run.state(), status)
    assert "first figures come" in said(open_page("monitor"))
    gpus = [{"index": 0, "name": "H200", "utilisation": 87, "memory": 12 * GIB, "memory_total": 140 * GIB}]
    gpus[0] |= {"temperature": 54, "power": None}
    write(run, [sample(time.time() - 4), sample(time.time(), gpus=gpus)])
    text = said(open_page("monitor", tab="System"))
    assert "CPU 90 % of 2 cores (this run 75 %)" in text and "4.0 of 16.0 GiB (this run 1.0)" in text
    assert "GPU 0: 87 %, 12.0 of 140.0 GiB, 54 °C" in text and "Not told by this GPU: GPU power" in text
    write(run, [sample(time.time() - 70)])
    assert re.search(r"1 min \d* s ago", said(open_page("monitor"))), "an old sample is not the state of now"


def test_monitor_of_an_ended_run_has_charts_and_no_strip(runs):
    run = store.create(runs, Recipe())
    write(run, [sample(time.time() - 2.0 * i) for i in range(900, 0, -1)])
    run.end(run.state(), "done", None)
    app = open_page("monitor", tab="System")
    assert not app.error and "CPU 90 %" not in said(app) and "No GPU was seen" in said(app)


@pytest.mark.parametrize("content", [b"", b"\x00\xff", b"[1]\n", b'{"time": 1}\n', b'{"time": "x", "cpu": {}}\n'])
def test_a_damaged_file_breaks_no_page(runs, content):
    run = store.create(runs, Recipe())
    (run.folder / store.SYSTEM).write_bytes(content)
    run.claim(run.state(), "running")
    assert not open_page("monitor", tab="System").error


def write(run, records):
    content = "".join(json.dumps(record) + "\n" for record in records)
    store.write_atomic(run.folder / store.SYSTEM, content.encode())


def until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def quick(sampler):
    return lambda run: sampler(run, every=0.02)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call
