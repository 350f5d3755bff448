"""Models in: plain diffusers opens what ships; wrong or unsafe input is one line."""

import json
import shutil

import pytest
import torch
from conftest import make_unet

from prunedm import bundled
from prunedm import unet as unets
from prunedm.unet import ModelError


def test_the_bundled_model_loads_with_plain_diffusers_and_equals_ours():
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(str(bundled.MODEL))
    ours = unets.load("bundled")
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([10, 500])
    with torch.no_grad():
        assert torch.equal(pipeline.unet.float()(x, t).sample, ours.unet(x, t).sample)
    assert unets.parameters(ours.unet) == 2_734_945
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 28, 28, 1)


def test_the_shipped_evaluations_belong_to_the_shipped_weights():
    import hashlib

    weights = (bundled.MODEL / "unet" / unets.WEIGHTS).read_bytes()
    assert json.loads(bundled.EVALUATIONS.read_text())["weights_sha256"] == hashlib.sha256(weights).hexdigest()


def test_the_assets_stay_small():
    total = sum(p.stat().st_size for p in bundled.ASSETS.rglob("*") if p.is_file())
    assert total < 15e6


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy / "unet")
    return str(copy)


def _pickle_only(unet):
    (unet / unets.WEIGHTS).unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"x")


def _other_class(unet):
    config = json.loads((unet / "config.json").read_text())
    (unet / "config.json").write_text(json.dumps(config | {"_class_name": "UNet3DModel"}))


def _missing_tensor(unet):
    from safetensors.torch import load_file, save_file

    tensors = load_file(unet / unets.WEIGHTS)
    tensors.pop("conv_out.bias")
    save_file(tensors, unet / unets.WEIGHTS)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda u: (u / "config.json").unlink(), "no readable config.json"),
        (lambda u: (u / "config.json").write_text("{"), "config.json is no JSON"),
        (lambda u: (u / unets.WEIGHTS).unlink(), "has no"),
        (_pickle_only, "pickled weights, which are never loaded"),
        (_other_class, "'UNet3DModel'; only UNet2DModel"),
        (lambda u: (u / unets.WEIGHTS).write_bytes(b"\x00" * 40), "cannot be read"),
        (_missing_tensor, "do not fit"),
    ],
)
def test_damaged_models_are_refused_in_one_line(model_folder, tmp_path, change, says):
    with pytest.raises(ModelError, match=says) as caught:
        unets.load(damaged(model_folder, tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nowhere", "../up", "a/b/c"])
def test_a_source_that_is_not_there_is_said(source):
    with pytest.raises(ModelError, match="is not there"):
        unets.load(source)


@pytest.mark.parametrize(("device", "says"), [("cuda:99", "CUDA devices")])
def test_a_device_that_is_not_there_is_said(device, says):
    with pytest.raises(ModelError, match=says):
        unets.resolve_device(device)


def test_macs_follow_the_definition():
    """One convolution and one linear layer by hand: outputs times inputs times kernel."""
    unet = make_unet()
    doubled = make_unet(sample_size=16)
    by_hand = 0

    def count(module, inputs, output):
        nonlocal by_hand
        by_hand += output.numel() * module.weight[0].numel()

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    found = unets.macs(unet)
    attention = sum(2 * 16**2 * m.to_q.out_features for m in unet.modules() if m.__class__.__name__ == "Attention")
    assert found == by_hand + attention  # 4x4 = 16 tokens: q k^T and the product with v
    assert unets.macs(doubled) > 4 * (found - attention) * 0.95


def test_the_scheduler_is_the_one_that_the_config_names(tmp_path):
    from diffusers import DDIMScheduler, PNDMScheduler

    unets.save(make_unet(), DDIMScheduler(prediction_type="v_prediction"), tmp_path / "ddim", {})
    found = unets.load(str(tmp_path / "ddim")).scheduler
    assert isinstance(found, DDIMScheduler) and found.config.prediction_type == "v_prediction"
    PNDMScheduler().save_pretrained(tmp_path / "ddim" / "scheduler")
    with pytest.raises(unets.ModelError, match="holds a 'PNDMScheduler'; save the model with a DDPMScheduler or"):
        unets.load(str(tmp_path / "ddim"))


def call(unet):
    x = torch.randn(2, *unets.image_shape(unet), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700])).sample


def test_a_packed_file_is_a_model_too(model_folder, tmp_path):
    from prunedm import export, subject

    source = subject.find(str(model_folder), None, tmp_path, export.verify.parse("2:4"))
    export.write(source, "packed", tmp_path / "m.safetensors", "fp32")
    loaded = unets.load(str(tmp_path / "m.safetensors"))
    assert torch.equal(call(loaded.unet), call(unets.load(str(model_folder)).unet))
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"torn\.safetensors"):
        unets.load(str(tmp_path / "torn.safetensors"))


def test_shards_and_variants_load_and_missing_shards_are_named(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    def sharded(unet):
        tensors = load_file(unet / unets.WEIGHTS)
        (unet / unets.WEIGHTS).unlink()
        for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
            part = {name: tensors[name] for name in names}
            save_file(part, unet / f"diffusion_pytorch_model-{i:05}-of-00002.safetensors")

    folder = damaged(model_folder, tmp_path, sharded)
    wanted = call(unets.load(str(model_folder)).unet)
    assert torch.equal(call(unets.load(folder).unet), wanted)
    next((tmp_path / "copy" / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(ModelError, match="1 weight files that do not make one model"):
        unets.load(folder)
    shutil.rmtree(tmp_path / "copy")
    folder = damaged(
        model_folder, tmp_path, lambda u: (u / unets.WEIGHTS).rename(u / "diffusion_pytorch_model.fp16.safetensors")
    )
    assert torch.equal(call(unets.load(folder).unet), wanted)


def test_a_class_conditional_model_is_refused(model_folder, tmp_path):
    def conditional(unet):
        config = json.loads((unet / "config.json").read_text())
        (unet / "config.json").write_text(json.dumps(config | {"num_class_embeds": 10}))

    with pytest.raises(ModelError, match="class-conditional; only unconditional UNets"):
        unets.load(damaged(model_folder, tmp_path, conditional))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"out_channels": 2}, "puts out 2 channels for 1: models that learn the variance"),
        ({"time_embedding_type": "fourier"}, "embeds noise levels"),
    ],
)
def test_models_of_another_kind_are_refused(model_folder, tmp_path, change, words):
    def changed(unet):
        config = json.loads((unet / "config.json").read_text())
        (unet / "config.json").write_text(json.dumps(config | change))

    with pytest.raises(ModelError, match=words):
        unets.load(damaged(model_folder, tmp_path, changed))


def test_a_latent_pipeline_is_refused(model_folder, tmp_path):
    folder = damaged(model_folder, tmp_path, lambda unet: None)
    index = tmp_path / "copy" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ModelError, match="has a vqvae beside its UNet"):
        unets.load(folder)


def test_a_hub_id_is_fetched_as_safetensors_only(model_folder, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(source, allow_patterns):
        asked[source] = allow_patterns
        return str(model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(call(unets.load("someone/model").unet), call(unets.load(str(model_folder)).unet))
    assert all(name.endswith((".json", ".safetensors")) for name in asked["someone/model"])


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(source, allow_patterns):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ModelError, match=r"the hub did not give it .* check the id and the network") as error:
        unets.load("someone/model")
    assert "\n" not in str(error.value)
