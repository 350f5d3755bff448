"""Sheets and snapshots: what is written is what is read."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prunedm import pattern, pictures, snapshots


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 8, 11])
def test_a_sheet_gives_back_each_image_and_its_record(tmp_path, channels, count):
    images = torch.randint(0, 256, (count, channels, 5, 7), dtype=torch.uint8)
    (tmp_path / "s.png").write_bytes(pictures.sheet_png(images, {"seed": 3}))
    found, info = pictures.read_sheet(tmp_path / "s.png")
    assert len(found) == count and info["seed"] == 3
    for image, original in zip(found, images):
        array = np.asarray(image)
        assert np.array_equal(array if channels == 3 else array[..., None], original.permute(1, 2, 0).numpy())


def test_a_picture_that_is_no_sheet_is_refused(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="is no sample sheet"):
        pictures.read_sheet(tmp_path / "other.png")


def test_snapshots_round_trip(tmp_path):
    """Two patterns of different M, one after the other."""
    gen = np.random.default_rng(0)
    parts = [(gen.random(shape) < 0.5).astype(np.uint8) for shape in ((37, 4), (5, 8))]
    snapshots.write(tmp_path / "m.npz", parts)
    assert np.array_equal(snapshots.read(tmp_path / "m.npz"), np.concatenate([part.ravel() for part in parts]))


def test_a_layers_mask_has_the_weights_axes():
    weight = torch.arange(48).reshape(3, 4, 2, 2)
    flat = torch.cat([torch.zeros(8, dtype=torch.long), pattern.group(weight, 4).flatten()]).numpy()
    found = snapshots.layer_mask(flat, {"offset": 8, "shape": [3, 4, 2, 2]})
    assert np.array_equal(found, weight.permute(0, 2, 3, 1).reshape(3, 4, 4).numpy())
    changed = snapshots.changed_share(flat, np.zeros_like(flat), {"offset": 8, "shape": [3, 4, 2, 2]})
    assert changed.shape == (3, 4) and changed.min() == 0.75 and changed.max() == 1.0, "weight 0 alone equals the zeros"


@given(st.integers(1, 200), st.integers(1, 200))
def test_shrinking_keeps_the_mean_of_equal_blocks(rows, columns):
    values = np.full((rows, columns), 0.25)
    small = snapshots.shrink(values)
    assert max(small.shape) <= snapshots.LARGEST and np.allclose(small, 0.25)
