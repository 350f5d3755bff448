"""Masks files: what is written is read back, and everything torn or altered is named."""

import json
import shutil

import pytest
import torch
from conftest import make_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunedm import maskfile, pattern
from prunedm.masked_unet import MaskedUNet


@pytest.fixture
def written(tmp_path):
    masked = MaskedUNet(make_unet(), 2, 4, [("mid_block.*", "1:4")])
    patterns = {r.layer: r.pattern for r in masked.reports if r.eligible}
    path = tmp_path / "masks.safetensors"
    maskfile.write(path, masked.layer_masks(), patterns, {"run": "a-run"})
    return path, masked


@given(st.integers(2, 16), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_what_is_written_is_read_back(tmp_path_factory, m, out, groups, conv, seed):
    shape = (out, groups * m, 3, 3) if conv else (out, groups * m)
    n = 1 + seed % (m - 1)
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    mask = pattern.ungroup(pattern.keep(pattern.group(scores, m), n), shape)
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    maskfile.write(path, {"a.layer": mask}, {"a.layer": f"{n}:{m}"}, {})
    assert torch.equal(maskfile.read(path)["a.layer"], mask)
    assert maskfile.verify(path) == []
    assert path.stat().st_size < mask.numel() // 8 + 400, "eight positions a byte"


def test_a_file_of_a_model_restores_its_masks(written):
    path, masked = written
    other = MaskedUNet(make_unet(), 2, 4, [("mid_block.*", "1:4")])
    other.set_initial([torch.rand(b.weights.shape) for b in other.banks])
    other.set_layer_masks(maskfile.read(path))
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(masked.banks, other.banks))
    assert maskfile.manifest(path)["run"] == "a-run"


def test_verify_reads_the_model_that_wears_the_masks(written, tmp_path):
    path, masked = written
    baked = masked.bake().state_dict()
    save_file(baked, tmp_path / maskfile.WEIGHTS)
    assert maskfile.verify(path, tmp_path) == []
    name = masked.banks[0].layers[0].name
    baked[name] = torch.ones_like(baked[name])
    save_file(baked, tmp_path / maskfile.WEIGHTS)
    (problem,) = maskfile.verify(path, tmp_path)
    assert name.removesuffix(".weight") in problem and "pruned weights are not zero" in problem
    del baked[name]
    save_file(baked, tmp_path / maskfile.WEIGHTS)
    assert "its weight is not there" in maskfile.verify(path, tmp_path)[0]


def test_a_group_with_too_many_is_found(tmp_path):
    path = tmp_path / "masks.safetensors"
    mask = torch.tensor([[True, True, True, False, True, True, False, False]])
    maskfile.write(path, {"a": mask}, {"a": "2:4"}, {})
    assert maskfile.verify(path) == ["a: 1 of 2 groups do not keep exactly 2 of 4"]


def spoil_manifest(path, change):
    record = json.loads(maskfile.manifest_path(path).read_text())
    change(record)
    maskfile.manifest_path(path).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(reversed(path.read_bytes()))),
        lambda path: path.unlink(),
        lambda path: maskfile.manifest_path(path).unlink(),
        lambda path: maskfile.manifest_path(path).write_text("{"),
        lambda path: maskfile.manifest_path(path).write_text("[]"),
        lambda path: spoil_manifest(path, lambda r: r.pop("layers")),
        lambda path: spoil_manifest(path, lambda r: r["layers"].update(x={"shape": [4, 4], "pattern": "2:4"})),
        lambda path: spoil_manifest(path, lambda r: next(iter(r["layers"].values())).update(shape=[10**9, 10**9])),
        lambda path: spoil_manifest(path, lambda r: next(iter(r["layers"].values())).update(pattern="dense")),
        lambda path: spoil_manifest(path, lambda r: next(iter(r["layers"].values())).update(pattern="3:7")),
        lambda path: spoil_manifest(path, lambda r: r.update(schema=99)),
        lambda path: spoil_manifest(path, lambda r: r.pop("sha256")),
        lambda path: spoil_manifest(path, lambda r: next(iter(r["layers"].values())).pop("kept")),
    ],
)
def test_torn_and_altered_files_are_refused_in_one_line(written, damage):
    path, _ = written
    damage(path)
    with pytest.raises(maskfile.MaskFileError) as caught:
        maskfile.read(path)
    assert "\n" not in str(caught.value) and str(path.parent) in str(caught.value)
    assert maskfile.verify(path) == [str(caught.value)]


def test_masks_are_found_in_a_run_a_variant_or_by_name(written, tmp_path):
    path, _ = written
    variant = tmp_path / "run" / "variants" / "nm"
    variant.mkdir(parents=True)
    shutil.copy(path, variant)
    assert maskfile.locate(tmp_path / "run") == maskfile.locate(variant) == variant / "masks.safetensors"
    assert maskfile.locate(path) == path
    with pytest.raises(maskfile.MaskFileError, match=r"no masks.safetensors in"):
        maskfile.locate(tmp_path / "nothing")
