"""Growing files: read bit by bit they hold what a full read finds; columns hold the records' numbers."""

import json
import math
import os
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunedm import jsonl, store
from prunedm.jsonl import Lines, Tail
from prunedm.steps import FIRST_ROOM, Columns, Steps
from prunedm.store import StoreError

RECORD = st.builds(
    lambda stage, step, figures: {"stage": stage, "step": step, "time": step / 7, **figures},
    st.sampled_from(["finetune", "mask", "recover"]),
    st.integers(1, 10**6),
    st.dictionaries(st.sampled_from(["loss", "tau", "flips"]), st.floats(-1e6, 1e6)),
)


def rows(steps):
    """The records that columns stand for."""
    for stretch in steps.stretches:
        for i in range(len(stretch)):
            found = {name: column[i] for name, column in stretch.figures.items() if not math.isnan(column[i])}
            yield {"stage": stretch.stage, "step": stretch.steps[i], "time": stretch.times[i], **found}


@given(st.lists(RECORD, max_size=60), st.integers(0, 60))
def test_columns_are_the_records_however_they_come(records, cut):
    columns = Columns()
    columns.add(records[:cut])
    before = columns.now()
    kept = list(rows(before))
    columns.add(records[cut:])
    assert list(rows(columns.now())) == records and len(columns.now()) == len(records)
    assert list(rows(before)) == kept == records[:cut], "what was given stays as it was"
    assert [(s.stage, len(s)) for s in columns.now().stretches] == [
        (s.stage, len(s)) for s in Steps.of(records).stretches
    ]


def test_columns_make_room_and_leave_earlier_ones_alone():
    columns = Columns()
    many = [{"stage": "mask", "step": i, "time": i / 2, "loss": float(i)} for i in range(5 * FIRST_ROOM)]
    for begin in range(0, len(many), 700):
        columns.add(many[begin : begin + 700])
        if not begin:
            early = columns.now().stretches[0].figures["loss"]
    assert np.array_equal(columns.now().stretches[0].figures["loss"], np.arange(len(many)))
    assert np.array_equal(early, np.arange(700))


@pytest.mark.parametrize(
    "bad",
    [
        {"a": {"b": 1}}, {"stage": "mask"}, {"step": 1}, {"stage": 1, "step": 1}, {"stage": "mask", "step": {}},
        {"stage": ["mask"], "step": 1}, {"stage": "mask", "step": 1, "loss": "low"},
        {"stage": "mask", "step": 1, "loss": [1]},
    ],
)  # fmt: skip
def test_what_is_no_step_record_is_said_in_one_line(bad):
    with pytest.raises(StoreError, match=r"metrics\.jsonl is damaged") as caught:
        Steps.of([{"stage": "mask", "step": 1, "time": 0.0, "loss": 1.0}, bad])
    assert "\n" not in str(caught.value)


# --- following a file ----------------------------------------------------------------------------
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(RECORD, min_size=1, max_size=5)),
        st.tuples(st.just("tear"), st.integers(1, 40)),  # a writer is killed in the middle of a line
        st.tuples(st.just("cut"), st.integers(0, 400)),
        st.tuples(st.just("replace"), st.lists(RECORD, max_size=8)),
        st.tuples(st.just("rewrite"), st.lists(RECORD, max_size=8)),  # in place: the inode stays
        st.tuples(st.just("remove"), st.none()),
    ),
    max_size=12,
)


def change(run, kind, given_):
    path = run.metrics_path
    whole = b"".join(json.dumps(r).encode() + b"\n" for r in given_) if isinstance(given_, list) else b""
    if kind == "append":
        run.append(path.name, given_)
    elif kind == "tear":
        with path.open("ab") as file:
            file.write(b'{"stage": "mask", "step": 3, "time": 0.5, "loss": 0.1}\n'[:given_])
    elif kind == "cut" and path.exists():
        os.truncate(path, min(given_, path.stat().st_size))
    elif kind == "replace":
        store.write_atomic(path, whole)
    elif kind == "rewrite":
        path.write_bytes(whole)
    elif kind == "remove":
        path.unlink(missing_ok=True)


@given(CHANGES, st.integers(1, 200))
def test_a_followed_file_holds_what_a_full_read_finds(tmp_path_factory, changes, block):
    run = store.Run(tmp_path_factory.mktemp("run"))
    lines, steps = Tail(run.metrics_path, Lines), Tail(run.metrics_path, Columns)
    before, jsonl.BLOCK = jsonl.BLOCK, block
    try:
        for kind, given_ in changes:
            change(run, kind, given_)
            assert lines.read() == run.metrics()
            assert list(rows(steps.read())) == run.metrics()
    finally:
        jsonl.BLOCK = before


def test_only_what_is_new_is_parsed(tmp_path, monkeypatch):
    run, parsed, parse = store.Run(tmp_path), [], jsonl.parsed
    monkeypatch.setattr(jsonl, "parsed", lambda lines: parsed.append(len(lines) + 1) or parse(lines))
    tail = Tail(run.metrics_path, Columns)
    for step in range(50):
        run.append("metrics.jsonl", [{"stage": "mask", "step": step}])
        assert len(tail.read()) == len(tail.read()) == step + 1
    assert sum(parsed) == run.metrics_path.stat().st_size


def test_a_replaced_file_of_the_same_length_and_inode_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "mask", "step": 1}\n')
    tail = Tail(path, Lines)
    assert tail.read()[0]["step"] == 1
    inode = path.stat().st_ino
    path.write_text('{"stage": "mask", "step": 2}\n{"stage": "mask", "step": 3}\n')
    assert path.stat().st_ino == inode
    assert [record["step"] for record in tail.read()] == [2, 3]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"a": 1}\n{"a": 2\n{"a": 3}\n\n[4]\n{"a": 5}\n', [1, 3, 5]),
        ('{"a": 1}\n{"a": [{}\n{}]}\n{"a": 3}\n', [1, 3]),  # two torn lines that make a whole one
    ],
)
def test_a_torn_line_in_the_middle_is_left_out(tmp_path, content, expected):
    path = tmp_path / "events.jsonl"
    path.write_text(content)
    assert Tail(path, Lines).read() == [{"a": value} for value in expected]


@pytest.mark.parametrize(
    "line",
    [
        '{"loss": NaN}',
        '{"loss": -Infinity}',
        '{"name": "\\ud800"}',
        '{"a": 1, "a": 2}',
    ],
)
def test_what_the_fast_reader_does_not_know_is_read_all_the_same(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 0.1}\n' + line + '\n{"loss": 0.30000000000000004}\n')
    expected = [{"loss": 0.1}, json.loads(line), {"loss": 0.30000000000000004}]
    assert repr(jsonl.read_jsonl(path)) == repr(expected)


def test_a_line_nested_without_end_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 0.1}\n' + "[" * 200_000 + '\n{"loss": 0.2}\n')
    assert jsonl.read_jsonl(path) == [{"loss": 0.1}, {"loss": 0.2}]


def test_damage_is_told_each_time_and_is_over_when_the_file_is_mended(tmp_path):
    run = store.Run(tmp_path)
    good = [{"stage": stage, "step": 1, "time": 0.0} for stage in ("finetune", "mask")]
    run.append("metrics.jsonl", good[:1])
    tail = Tail(run.metrics_path, Columns)
    tail.read()
    run.append("metrics.jsonl", [good[1], {"stage": "mask"}])
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            tail.read()
    with run.metrics_path.open("r+b") as file:
        file.truncate(len("".join(json.dumps(record) + "\n" for record in good)))
    assert list(rows(tail.read())) == good


def test_threads_that_follow_one_file_see_whole_records(tmp_path):
    run = store.Run(tmp_path)
    tail, wrong = Tail(run.metrics_path, Columns), []

    def follow():
        seen = 0
        while seen < 3000:
            found = tail.read()
            if len(found) < seen or not np.array_equal(
                np.concatenate([s.figures["loss"] for s in found.stretches] or [np.array([])]), np.arange(len(found))
            ):
                wrong.append(len(found))
            seen = len(found)

    threads = [threading.Thread(target=follow) for _ in range(3)]
    for thread in threads:
        thread.start()
    for begin in range(0, 3000, 30):
        run.append("metrics.jsonl", [{"stage": "mask", "step": i, "loss": i} for i in range(begin, begin + 30)])
    for thread in threads:
        thread.join(180)
        assert not thread.is_alive()
    assert wrong == []
