"""Times of sleeps of known length, the order of calls, and memory of known size."""

import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import make_unet
from torch import nn

from prunedm import latency
from prunedm.memory import PeakMemory, peak_growth

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    """Sleeps ``seconds`` a call, and notes its name and how long it really slept."""

    def __init__(self, seconds=0.0, name="", calls=None):
        super().__init__()
        self.seconds, self.name, self.calls = seconds, name, [] if calls is None else calls
        self.slept = []
        self.place = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(in_channels=1, sample_size=4)

    def forward(self, x, t):
        self.calls.append((self.name, len(x)))
        began = time.perf_counter()
        time.sleep(self.seconds)
        self.slept.append(1000 * (time.perf_counter() - began))
        return x


def last(steps):
    *_, found = steps
    return found


def test_sleeps_measure_as_long_as_they_are_and_alone_as_beside_a_slow_variant():
    """5 %, of the sleeps as they were: a busy machine lengthens them, and the harness must see that too."""
    alone, beside, slow = Sleeper(0.02), Sleeper(0.02), Sleeper(0.05)
    found = {"alone": last(latency.measure({"alone": alone}, 4, 21))["alone"]}
    found |= last(latency.measure({"slow": slow, "beside": beside}, 4, 21))
    for name, sleeper in (("alone", alone), ("beside", beside), ("slow", slow)):
        slept = sleeper.slept[latency.WARMUP :]
        assert len(slept) == 21
        assert found[name].median == pytest.approx(statistics.median(slept), rel=0.05)
        assert 1000 * sleeper.seconds <= found[name].p10 <= found[name].median <= found[name].p90
    assert found["alone"].per_image == found["alone"].median / 4 and found["alone"].batch == 4


def test_rounds_are_interleaved_and_each_begins_with_the_next_variant():
    calls = []
    unets = {name: Sleeper(name=name, calls=calls) for name in "abc"}
    seen = list(latency.measure(unets, 2, 4))
    order = "".join(name for name, _ in calls[3 * latency.WARMUP :])
    assert order == "abc" + "bca" + "cab" + "abc"
    assert len(seen) == 4 and list(seen[0]) == ["a", "b", "c"] and {n for _, n in calls} == {2}


def test_a_drifting_machine_does_not_favour_a_variant(monkeypatch):
    """A clock on which each call takes longer than the one before: rotation leaves the two alike."""
    clock = {"now": 0.0, "call": 0}

    class Drifting(Sleeper):
        def forward(self, x, t):
            clock["call"] += 1
            clock["now"] += 0.01 * (1 + 0.05 * clock["call"])
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    found = last(latency.measure({"a": Drifting(), "b": Drifting()}, 1, 16))
    assert found["a"].median == pytest.approx(found["b"].median, rel=0.01)


def test_percentiles_are_those_of_the_known_durations_without_the_warm_up(monkeypatch):
    """1 to 11 ms in no order: between the ends lie ten equal steps, so a tenth of them is one."""
    clock, durations = {"now": 0.0}, [500, 700, 7, 2, 11, 4, 1, 9, 6, 10, 3, 8, 5]

    class Timed(Sleeper):
        def forward(self, x, t):
            clock["now"] += durations.pop(0) / 1000
            return x

    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    found = last(latency.measure({"a": Timed()}, 4, 11))["a"]
    assert not durations and latency.WARMUP == 2
    assert [found.p10, found.median, found.p90] == pytest.approx([2, 6, 10], rel=1e-9)
    assert found.per_image == found.median / 4


def test_compare_keeps_its_shape():
    dense, pruned = Sleeper(0.02), Sleeper(0.01)
    found = latency.compare(dense, pruned, batch=3, rounds=3)
    assert set(found) == {"dense", "pruned", "ratio", "device", "batch"} and found["batch"] == 3
    slept = [statistics.median(one.slept[latency.WARMUP :]) for one in (pruned, dense)]
    assert found["ratio"] == pytest.approx(slept[0] / slept[1], rel=0.1)
    assert found["device"] == f"cpu ({torch.get_num_threads()} threads)"


def test_benchmark_gives_a_row_for_each_variant_way_and_batch():
    unet = make_unet()
    steps = list(latency.benchmark({"a": unet, "b": Sleeper()}, ("eager", "channels_last"), (1, 3), 2))
    assert len(steps) == latency.benchmark_steps((1, 3), 2) == 5
    rows = steps[-1]
    keys = [(row.variant, row.way, row.batch) for row in rows]
    assert keys == [(v, way, n) for n in (1, 3) for v in "ab" for way in ("eager", "channels_last")]
    for row in rows:
        assert row.threads == torch.get_num_threads() and row.rounds == 2 and not row.absent
        assert row.memory >= 0 and row.memory_of == "resident set growth"
        assert row.call.batch == row.batch and row.as_dict()["per_image"] == row.call.median / row.batch
    assert all(p.is_contiguous() for p in unet.parameters())  # the caller's own model keeps its layout


def test_channels_last_feeds_what_the_weights_are_laid_out_for():
    unet = make_unet(in_channels=3, out_channels=3)
    laid = latency.contenders({"a": unet}, ("channels_last",), {})["a", "channels_last"]
    x, t = latency.example(laid, 2)
    assert x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    plain, _ = latency.example(unet, 2)
    assert plain.is_contiguous() and torch.equal(plain, x)
    with torch.no_grad():
        assert torch.allclose(unet(plain, t).sample, laid(x, t).sample, atol=1e-5)


class Thrice(Sleeper):
    def forward(self, x, t):
        return x * 3 + self.place


def test_compile_runs_compiled_code_for_each_batch_size(monkeypatch):
    asked, real = [], torch.compile

    def compile_(module, **options):
        asked.append(options)
        return real(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compile_)
    rows = last(latency.benchmark({f"v{i}": Thrice() for i in range(5)}, ("compile",), (1, 2), 1, memory=False))
    assert asked == [{"dynamic": False}] * 5
    assert len(rows) == 10 and not any(row.absent for row in rows)  # more than the 8 forms dynamo keeps by itself
    assert {row.memory for row in rows} == {None}


def test_onnx_runtime_is_timed_where_a_file_or_a_session_was_given(tmp_path):
    from prunedm import onnx_export

    unet = make_unet()
    path = tmp_path / "unet.onnx"
    path.write_bytes(onnx_export.build(unet, {}).SerializeToString())
    session = latency.OnnxModel(path.read_bytes(), (1, 8, 8))
    opened = latency.OnnxModel(path, (1, 8, 8))
    x, t = latency.example(unet, 2)
    with torch.no_grad():
        assert torch.allclose(opened(x, t), unet(x, t).sample, atol=1e-3)
    given = {"file": path, "session": session}
    rows = last(latency.benchmark(dict.fromkeys(("file", "session", "none"), unet), ("onnxruntime",), (1,), 2, given))
    file, made, none = rows
    assert file.call.median > 0 and made.call.median > 0 and file.threads == made.threads == torch.get_num_threads()
    assert file.memory is None and file.memory_of is None  # ONNX Runtime's arena would show no growth
    assert none.call is None and none.absent == "no ONNX model was given for this variant"
    assert none.as_dict()["per_image"] is None
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name in ("broken.onnx", "missing.onnx"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable ONNX model; export it again") as caught:
            latency.OnnxModel(tmp_path / name, (1, 8, 8))
        assert "\n" not in str(caught.value)


class TooLarge(Sleeper):
    def forward(self, x, t):
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
        return x


def test_what_cannot_run_is_absent_with_its_reason_and_the_rest_is_measured():
    rows = last(latency.benchmark({"a": TooLarge(), "b": Sleeper()}, batches=(1, 8), rounds=2))
    assert [row.call is None for row in rows] == [False, False, True, False]
    assert rows[2].absent == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert rows[2].memory is None
    only = last(latency.benchmark({"a": TooLarge()}, batches=(8,), rounds=2))
    assert len(only) == 1 and only[0].call is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ways": ("fast",)}, "way 'fast' is not known; use one of eager, channels_last, compile, onnxruntime"),
        ({"ways": ()}, "way 'none' is not known"),
        ({"batches": (0, 8)}, "must be 1 or more"),
        ({"rounds": 0}, "must be 1 or more"),
        ({"variants": {}}, "variants is empty"),
    ],
)
def test_bad_requests_are_one_line(changes, line):
    with pytest.raises(ValueError, match=line) as caught:
        next(latency.benchmark(**({"variants": {"a": Sleeper()}} | changes)))
    assert "\n" not in str(caught.value)


def hold(mebibytes):
    block = torch.ones(mebibytes * 2**18)  # float32
    time.sleep(0.1)
    return block.sum()


def test_peak_memory_of_a_block_of_known_size_again_and_again():
    for _ in range(3):
        assert peak_growth(lambda: hold(96), CPU) == pytest.approx(96 * 2**20, rel=0.1)
    small = [torch.ones(2**10) for _ in range(2**13)]  # 32 MiB in pieces that malloc keeps for itself
    small.clear()
    with PeakMemory(CPU) as memory:
        kept = [torch.ones(2**10) for _ in range(2**13)]
        time.sleep(0.3)  # for the thread that watches to see it
    assert len(kept) == 2**13 and memory.growth == pytest.approx(32 * 2**20, rel=0.25)


def test_a_device_without_a_count_of_its_peak_has_no_figure():
    with PeakMemory(torch.device("meta")) as memory:
        pass
    assert memory.growth is None and memory.of is None and peak_growth(lambda: None, torch.device("meta")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_events_time_the_stream_and_the_allocator_counts():
    device = torch.device("cuda")
    unet = make_unet().to(device)
    row = last(latency.benchmark({"a": unet}, batches=(8,), rounds=5))[0]
    assert row.threads is None and row.memory_of == "torch.cuda.max_memory_allocated growth"
    assert row.memory > 0 and row.call.median > 0 and row.call.device == torch.cuda.get_device_name(device)

    class Cycles(Sleeper):
        def forward(self, x, t):
            torch.cuda._sleep(20_000_000)  # about 10 ms, and the host does not wait
            return x

    assert last(latency.measure({"a": Cycles().to(device)}, 1, 5))["a"].median > 5
    assert peak_growth(lambda: torch.ones(2**20, device=device), device) == 2**22
