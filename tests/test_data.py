"""Images in: folders with all sorts of files, batches by step number."""

import pytest
import torch
from PIL import Image

from prunedm import data


def test_the_bundled_set():
    images = data.load("bundled", (1, 28, 28))
    assert images.train.shape == (12_000, 1, 28, 28) and images.held_out.shape == (3_000, 1, 28, 28)
    labels, held_labels = data.load_bundled_labels()
    assert labels.bincount().tolist() == [1200] * 10 and held_labels.bincount().tolist() == [300] * 10
    with pytest.raises(ValueError, match=r"data\.source=bundled"):
        data.load("bundled", (3, 32, 32))


def test_a_folder_skips_and_names_broken_files(image_folder):
    images = data.load(str(image_folder), (1, 8, 8))
    assert len(images.train) == 36 and len(images.held_out) == 4
    assert [line.partition(":")[0] for line in images.skipped] == ["broken.png"]


def test_colour_and_alpha_become_what_the_model_expects(tmp_path):
    for i, mode in enumerate(["RGB", "RGBA", "L", "P", "1"]):
        Image.new(mode, (9, 7)).save(tmp_path / f"{i}.png")
    assert data.load(str(tmp_path), (3, 8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize("files", [0, 1])
def test_too_few_images_are_said(tmp_path, files):
    for i in range(files):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=f"holds {files} readable images"):
        data.load(str(tmp_path), (1, 8, 8))
    with pytest.raises(ValueError, match="is not a folder"):
        data.load(str(tmp_path / "none"), (1, 8, 8))


def test_batches_are_a_function_of_the_step_and_an_epoch_sees_each_image_once():
    images = torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1)
    batches, again = data.Batches(images, 5, seed=1), data.Batches(images, 5, seed=1)
    first = [batches.at(step) for step in range(6)]
    assert all(torch.equal(again.at(step), first[step]) for step in (5, 0, 3, 1, 4, 2))
    for epoch in range(3):
        seen = torch.cat(first[2 * epoch : 2 * epoch + 2]).flatten().sort().values
        assert torch.equal(seen, data.to_float(images).flatten())
    assert not torch.equal(torch.cat(first[:2]), torch.cat(first[2:4]))
    assert len(data.Batches(images, 64, seed=1).at(0)) == 10, "a small set gives smaller batches"
