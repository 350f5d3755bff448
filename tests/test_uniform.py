"""The uniform layout: an ordinary UNet2DModel, the time table, and folders that load without PruneDM."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import make_unet
from diffusers import DDPMScheduler

from prunedm import structured, uniform
from prunedm import unet as unets
from prunedm.stage_recipes import Prune

OUTSIDE = """
import sys
sys.modules["prunedm"] = None  # an import of it would fail
import torch
from diffusers import {loader}
pipeline = {loader}.from_pretrained(sys.argv[1]{trust})
x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    out = pipeline.unet.eval()(x, torch.tensor([3, 700])).sample
seed = torch.Generator().manual_seed(0)
images = pipeline(batch_size=1, num_inference_steps=2, output_type="np", generator=seed).images
from safetensors.torch import save_file
save_file({{"out": out, "images": torch.from_numpy(images)}}, sys.argv[2])
"""


def call(unet):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700])).sample


def pruned(layout, target=0.4, **changes):
    unet, report = structured.prune(make_unet(**changes), Prune(target=target, layout=layout), 4, 0)
    return unet, report


def outside(folder, tmp_path, loader, trust=""):
    """What a process that cannot import prunedm gets from the folder."""
    from safetensors.torch import load_file

    code = OUTSIDE.format(loader=loader, trust=trust)
    subprocess.run(
        [sys.executable, "-I", "-c", code, str(folder), str(tmp_path / "out.safetensors")],
        check=True, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return load_file(tmp_path / "out.safetensors")


@pytest.mark.parametrize("changes", [{}, {"attention_head_dim": None}, {"resnet_time_scale_shift": "scale_shift"}])
def test_the_config_tells_the_widths_and_the_function_is_kept(changes):
    unet, report = pruned("uniform", **changes)
    assert unets.follows_config(unet)
    assert list(unet.config.block_out_channels) == report.details["block_out_channels"] != [16, 32]
    assert report.parameters_after == unets.parameters(unet)
    assert report.details["time_embedding_residual"] <= uniform.RESIDUAL
    assert unet.config.time_embedding_type == "learned"


def test_plain_diffusers_loads_and_samples_in_a_process_without_prunedm(tmp_path):
    unet, _ = pruned("uniform")
    unets.save(unet, DDPMScheduler(), tmp_path / "model", {})
    assert not (tmp_path / "model" / "unet" / "pruned_unet.py").exists()
    found = outside(tmp_path / "model", tmp_path, "DDPMPipeline")
    assert torch.equal(found["out"], call(unet)), "bitwise"
    assert torch.equal(found["out"], call(unets.load(str(tmp_path / "model")).unet))
    assert found["images"].isfinite().all()


def test_free_widths_load_with_the_code_that_the_folder_carries(tmp_path):
    unet, _ = pruned("free")
    unets.save(unet, DDPMScheduler(), tmp_path / "model", {})
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["unet"] == ["pruned_unet", "PrunedUNet"]
    found = outside(tmp_path / "model", tmp_path, "DiffusionPipeline", ", trust_remote_code=True")
    assert torch.equal(found["out"], call(unet))
    assert found["images"].isfinite().all()


def test_our_own_loader_runs_no_code_of_a_folder(tmp_path):
    unet, _ = pruned("free")
    unets.save(unet, DDPMScheduler(), tmp_path / "model", {})
    (tmp_path / "model" / "unet" / "pruned_unet.py").write_text("raise SystemExit('executed')")
    assert torch.equal(call(unets.load(str(tmp_path / "model")).unet), call(unet))


def test_a_folder_that_was_free_and_is_uniform_now_drops_the_loader(tmp_path):
    unets.save(pruned("free")[0], DDPMScheduler(), tmp_path / "model", {})
    unets.save(pruned("uniform")[0], DDPMScheduler(), tmp_path / "model", {})
    assert not (tmp_path / "model" / "unet" / "pruned_unet.py").exists()
    assert json.loads((tmp_path / "model" / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]


def test_the_time_table_is_that_of_the_dense_model():
    unet = make_unet(block_out_channels=(64, 64), norm_num_groups=8, attention_head_dim=8)
    least = uniform.least_width(unet, 1000)
    assert 8 < least < 64
    table = uniform.time_table(unet, 1000)
    expected = unet.time_embedding.linear_1(unet.time_proj(torch.tensor([0, 517]))).double()
    assert torch.allclose(table[[0, 517]] + unet.time_embedding.linear_1.bias.double(), expected, atol=1e-6)
    u, s, v = torch.linalg.svd(table, full_matrices=False)
    for width, wanted in ((least, True), (least - 1, False)):
        left = (table - (u[:, :width] * s[:width]) @ v[:width]).norm() / table.norm()
        assert (left <= uniform.RESIDUAL) == wanted


def test_levels_that_share_a_stream_are_cut_alike():
    changes = {
        "block_out_channels": (16, 32, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    unet, report = pruned("uniform", **changes)
    widths = report.details["block_out_channels"]
    assert widths[1] == widths[2] < 32
    assert call(unet).isfinite().all()


def test_an_exported_model_can_be_pruned_again():
    once, _ = pruned("uniform", target=0.3)
    twice, report = structured.prune(copy.deepcopy(once), Prune(target=0.3, layout="uniform"), 4, 0)
    assert report.parameters_after < report.parameters_before == unets.parameters(once)
    assert unets.follows_config(twice)


def test_what_uniform_cannot_do_is_said():
    free, _ = pruned("free")
    with pytest.raises(ValueError, match=r"needs widths as in config.json .* use layout=free"):
        structured.prune(free, Prune(target=0.2, layout="uniform"), 4, 0)
    with pytest.raises(ValueError, match="this model has a fourier time embedding; use layout=free"):
        structured.prune(make_unet(time_embedding_type="fourier"), Prune(layout="uniform"), 4, 0)


@pytest.mark.parametrize("timesteps", [500, 4000])
def test_schedulers_of_other_lengths(timesteps):
    unet, _ = structured.prune(make_unet(), Prune(target=0.4, layout="uniform"), 4, 0, train_timesteps=timesteps)
    assert unet.time_proj.num_embeddings == timesteps
    with pytest.raises(ValueError, match=f"table has {timesteps} timesteps and its scheduler {timesteps + 1}"):
        structured.check(unet, Prune(layout="uniform"), 4, timesteps + 1)


def test_the_table_is_cut_and_the_function_stays():
    """Widths at which level 0 really shrinks: the residual is small and so is the change of the output."""
    unet = make_unet(block_out_channels=(64, 64), norm_num_groups=8)
    dense_widths = list(unet.config.block_out_channels)
    found, report = structured.prune(unet, Prune(target=0.5, layout="uniform"), 4, 0)
    assert found.config.block_out_channels[0] < dense_widths[0]
    assert 0 < report.details["time_embedding_residual"] <= uniform.RESIDUAL
    t = torch.arange(0, 1000, 37)
    fresh = make_unet(block_out_channels=(64, 64), norm_num_groups=8)
    wanted = fresh.time_embedding(fresh.time_proj(t))
    assert torch.allclose(found.time_embedding(found.time_proj(t)), wanted, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize(
    ("changes", "m", "more"),
    [
        ({}, 16, {}),  # level 0 allows no step
        ({"attention_head_dim": 32}, 4, {}),  # one head as wide as its level
        ({"block_out_channels": (16, 48), "attention_head_dim": 24}, 16, {"round_for": "tensor-core"}),
    ],
)
def test_levels_that_cannot_move_stay_and_the_others_shrink(changes, m, more):
    unet, report = structured.prune(make_unet(**changes), Prune(target=0.3, layout="uniform", **more), m, 0)
    assert unets.follows_config(unet) and call(unet).isfinite().all()
    assert report.parameters_after <= report.parameters_before + 1000 * 48
