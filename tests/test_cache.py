"""What is kept on disk: found again, never parsed when altered, never larger than allowed."""

import os

import numpy as np
import pytest

from prunedm import cache


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.ENV, str(tmp_path))
    return cache.folder("things")


def test_what_is_written_is_read_again_and_nothing_else(place):
    cache.write_arrays(place, "a", {"x": np.arange(5)})
    cache.write_record(place, "a", {"loss": 0.5})
    assert cache.read_arrays(place, "a")["x"].tolist() == [0, 1, 2, 3, 4]
    assert cache.read_record(place, "a") == {"loss": 0.5}
    assert cache.read_arrays(place, "b") is None and cache.read_record(cache.folder("others"), "a") is None


@pytest.mark.parametrize(
    "harm", [lambda b: b[:10], lambda b: b"", lambda b: b.replace(b"0.5", b"0.4"), lambda b: b"{}"]
)
def test_an_altered_record_is_as_good_as_absent_and_goes(place, harm):
    cache.write_record(place, "a", {"loss": 0.5})
    (path,) = place.iterdir()
    path.write_bytes(harm(path.read_bytes()))
    assert cache.read_record(place, "a") is None and not path.exists()


def test_a_digest_depends_on_every_part_and_not_on_the_order_of_names():
    assert cache.digest(1, {"a": 1, "b": 2}) == cache.digest(1, {"b": 2, "a": 1})
    found = {cache.digest(*parts) for parts in ((1,), (1, None), ("1",), ([1],), (1, {"a": 1}), (1, {"a": 2}))}
    assert len(found) == 6


def test_the_longest_unused_folders_go_first_and_the_one_at_work_stays(place, monkeypatch):
    for age, name in enumerate(("new", "middle", "old")):
        cache.write_arrays(place / name, "x", {"x": np.arange(1000)})
        os.utime(place / name, (1e9 - age, 1e9 - age))
    one = sum(f.stat().st_size for f in (place / "new").iterdir())
    monkeypatch.setenv(cache.LIMIT_ENV, str(2.5 * one / 2**30))
    cache.trim("things", keep=place / "old")
    assert sorted(p.name for p in place.iterdir()) == ["new", "old"]
    cache.trim("things", keep=place / "old")
    assert sorted(p.name for p in place.iterdir()) == ["new", "old"]
