"""UNets in and out: load a diffusers folder, rebuild a pruned one from its shapes, save, count.

A pruned UNet keeps diffusers' layer names; only widths differ from what ``config.json`` would build. Its
folder is read back (pruned_unet.py) by giving each layer empty parameters of the shapes in the safetensors
file and then loading strictly, so nothing is ever re-initialised in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import bundled, packed, parallel, sharding
from .model_check import UNBUILDABLE, ModelError, check_config
from .store import VARIANT_RECORD, write_atomic, write_json
from .untrusted import UntrustedError, one_line, read_json, require_header, shown

MOST_PRUNED_AWAY = 100  # times; a target is at most 90 %, rounds may follow one another
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"
FETCHED = ["*.json", "*diffusion_pytorch_model*.safetensors"]  # of a model on the hub: nothing else
LOADER = Path(__file__).with_name("pruned_unet.py")  # goes beside weights of free widths


@dataclass
class Diffusion:
    """A denoising model: the UNet and the scheduler it was trained with."""

    unet: nn.Module
    scheduler: Any

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return image_shape(self.unet)


def image_shape(unet: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that the UNet denoises."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return unet.config.in_channels, height, width


def load(source: str) -> Diffusion:
    """The bundled model, a diffusers pipeline folder, a bare UNet folder, a packed file or a Hugging Face id.

    Always float32, evaluation mode. Raises ModelError with value, rule and remedy.
    """
    folder = locate(source)
    if folder.is_file():
        return load_packed(folder)
    require_pixels(folder)
    return Diffusion(load_unet(unet_folder(folder)), _load_scheduler(folder))


def locate(source: str) -> Path:
    """The folder or file of a model, fetched first where it is a Hugging Face id; ModelError when it is not there."""
    folder = bundled.MODEL if source == bundled.NAME else Path(source).expanduser()
    return folder if folder.exists() else download(source, FETCHED)


def unet_folder(folder: Path) -> Path:
    """Where a pipeline folder, or a bare UNet folder, keeps the UNet."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def require_pixels(folder: Path) -> None:
    """ModelError for a pipeline with parts beside the UNet and its scheduler, such as an autoencoder."""
    path = folder / INDEX
    if not path.is_file():
        return
    try:
        index = read_json(path)
        others = [key for key in index if key[0] != "_" and key not in ("unet", "scheduler")]
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise ModelError(f"{path} cannot be read ({_line(error)}); restore it or give the unet folder") from error
    if others:
        raise ModelError(
            f"model folder {folder} has a {others[0]} beside its UNet; only pipelines that work on pixels are supported"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a UNet folder; ModelError where it is unreadable or of a kind that is not supported."""
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model folder {folder} has no readable config.json; give a folder written by diffusers' save_pretrained"
        )
    config = check_config(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in ("UNet2DModel", "PrunedUNet"):
        raise ModelError(f"model folder {folder} holds a {shown(kind)}; only UNet2DModel is supported")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        raise ModelError(f"model folder {folder} is class-conditional; only unconditional UNets are supported")
    if config.get("out_channels", 3) != config.get("in_channels", 3):
        raise ModelError(
            f"model folder {folder} puts out {config.get('out_channels')} channels for {config.get('in_channels')}: "
            "models that learn the variance are not supported"
        )
    if config.get("time_embedding_type") == "fourier":
        raise ModelError(
            f"model folder {folder} embeds noise levels (time_embedding_type fourier); only models of timesteps "
            "(DDPM, DDIM) are supported"
        )
    if config.get("sample_size") is None:
        raise ModelError(f"model folder {folder}: config.json has no sample_size; write the image side there")
    return config


def load_unet(folder: Path) -> nn.Module:
    """A UNet2DModel folder (``config.json`` and safetensors weights), pruned or not, strictly."""
    config = read_config(folder)
    tensors = read_weights(folder)
    try:
        from .pruned_unet import build  # late: it imports diffusers

        require_likely_size(config, sum(tensor.numel() for tensor in tensors.values()))
        return build(config, tensors)
    except ModelError:
        raise
    except RuntimeError as error:
        raise ModelError(f"weights in {folder} do not fit config.json ({_line(error)})") from error
    except (ValueError, TypeError, *UNBUILDABLE) as error:
        raise ModelError(
            f"model folder {folder} cannot be read: its config.json builds no UNet2DModel "
            f"({type(error).__name__}: {_line(error)})"
        ) from error


def require_likely_size(config: dict[str, Any], weights: int) -> None:
    """ModelError where a config would build far more than a file holds: so much is never pruned away."""
    from diffusers import UNet2DModel

    from .pruned_unet import public

    with torch.device("meta"):
        wanted = parameters(UNet2DModel.from_config(public(config)))
    if wanted > MOST_PRUNED_AWAY * weights + 1_000_000:
        raise ModelError(
            f"config.json builds {wanted:,} parameters and the file holds {weights:,}; give the config of these weights"
        )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a UNet folder's safetensors: one file (of any ``variant``), or the shards of a large model.

    ModelError when there are none, or they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in complete_files(folder):
        try:
            require_header(file)
            tensors |= load_file(file)
        except (SafetensorError, OSError, UntrustedError) as error:
            raise ModelError(f"{file} cannot be read ({_line(error)}); restore it or save the model again") from error
    return tensors


def complete_files(folder: Path) -> list[Path]:
    """:func:`weight_files`; ModelError where there are none, or they do not make one model."""
    files = weight_files(folder)
    parts = [re.search(r"-\d+-of-(\d+)", file.name) for file in files]
    whole = len(files) == 1 if not parts or parts[0] is None else all(p and int(p[1]) == len(files) for p in parts)
    if not whole:
        pickled = any(folder.glob("*.bin"))
        why = f"{len(files)} weight files that do not make one model" if files else f"no {WEIGHTS}"
        why = "only pickled weights, which are never loaded" if pickled and not files else why
        raise ModelError(f"model folder {folder} has {why}; save it with safe_serialization=True")
    return files


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a UNet folder: the one of the plain name, else all of any ``variant`` and the shards."""
    one = folder / WEIGHTS
    return [one] if one.is_file() else sorted(folder.glob("diffusion_pytorch_model*.safetensors"))


def load_packed(path: Path) -> Diffusion:
    """The model of a packed file (packed.py) that ``prunedm export`` wrote, float32 on the CPU."""
    config, tensors = packed.manifest(path)["config"], packed.read(path)
    try:
        from .pruned_unet import build  # late: it imports diffusers

        require_likely_size(config["unet"], sum(tensor.numel() for tensor in tensors.values()))
        return Diffusion(build(config["unet"], tensors), _scheduler(config["scheduler"]))
    except (TypeError, ValueError, *UNBUILDABLE) as error:
        raise ModelError(f"{path} holds no UNet2DModel with its scheduler ({_line(error)}); export it again") from error


def save(unet: nn.Module, scheduler, folder: Path, record: dict[str, Any]) -> None:
    """A diffusers pipeline folder (safetensors only); ``prunedm.json``, written last, marks it complete.

    Where the config tells the widths, plain diffusers loads it. Where they are free, the folder names the class
    ``PrunedUNet`` and carries its source, for ``DiffusionPipeline.from_pretrained(..., trust_remote_code=True)``.
    """
    from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler

    (folder / VARIANT_RECORD).unlink(missing_ok=True)
    pipeline = DDPMPipeline if isinstance(scheduler, DDPMScheduler) else DDIMPipeline
    pipeline(unet, scheduler).save_pretrained(folder, safe_serialization=True)
    source = folder / "unet" / LOADER.name
    if follows_config(unet):
        source.unlink(missing_ok=True)
    else:
        write_atomic(source, LOADER.read_bytes())
        write_json(folder / INDEX, read_json(folder / INDEX) | {"unet": [LOADER.stem, "PrunedUNet"]})
    write_json(folder / VARIANT_RECORD, record)


def follows_config(unet: nn.Module) -> bool:
    """Whether the config alone would build these widths, so that plain diffusers loads the weights."""
    from diffusers import UNet2DModel

    from .pruned_unet import public

    with torch.device("meta"):
        wanted = UNet2DModel.from_config(public(unet.config))
    shapes = {name: p.shape for name, p in wanted.named_parameters()}
    return all(shapes.get(name) == p.shape for name, p in unet.named_parameters())


def resolve_device(name: str) -> torch.device:
    """A recipe's device, of this rank; ModelError says what is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(name.partition(":")[2] or 0)
        if index >= count:
            raise ModelError(f"device={name}: this machine has {count} CUDA devices; use device: auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device=mps: no Apple GPU is available here; use device: auto")
    return parallel.own_device(torch.device(name))


def parameters(unet: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in unet.parameters())


def nonzero_parameters(unet: nn.Module) -> int:
    """Number of parameters that are not exactly zero."""
    return sum(int(p.count_nonzero()) for p in unet.parameters())


@torch.no_grad()
def macs(unet: nn.Module) -> int:
    """Multiply-accumulates of one UNet call on one image: half of torch's own FLOP count."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(unet.parameters())
    x = torch.zeros(1, *image_shape(unet), device=parameter.device, dtype=parameter.dtype)
    # The math backend is made of matrix products, which the counter knows on every device.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        unet(x, torch.zeros(1, device=x.device, dtype=torch.long))
    return counter.get_total_flops() // 2


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of a model's UNet weights: of a pipeline or UNet folder, or of a packed file."""
    files = [folder] if folder.is_file() else weight_files(unet_folder(folder))
    return sum(file.stat().st_size for file in files)


def download(source: str, patterns: list[str]) -> Path:
    """A Hugging Face id through huggingface_hub: the files of these patterns only."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        raise ModelError(f"model.source={source} is not there; give 'bundled', a diffusers folder or owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.source={source} is no folder here and the hub did not give it "
            f"({error.__class__.__name__}); check the id and the network, or give a folder"
        ) from error


def _load_scheduler(folder: Path):
    """The trained scheduler: DDPM or DDIM as its config says (DDPM where there is none)."""
    from diffusers import DDPMScheduler

    path = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    if path is None:
        return DDPMScheduler()
    config = check_config(path / "scheduler_config.json")
    try:
        return _scheduler(config)
    except KeyError as error:
        raise ModelError(
            f"{path} holds a {shown(error.args[0])}; save the model with a DDPMScheduler or a DDIMScheduler"
        ) from error
    except (ValueError, TypeError, *UNBUILDABLE) as error:
        raise ModelError(f"{path}/scheduler_config.json cannot be read ({_line(error)})") from error


def _scheduler(config: dict[str, Any]) -> Any:
    """The scheduler of a config; KeyError names a class that is not supported."""
    from diffusers import DDIMScheduler, DDPMScheduler

    from .pruned_unet import public

    classes = {"DDPMScheduler": DDPMScheduler, "DDIMScheduler": DDIMScheduler}
    chosen = classes[config.get("_class_name", "DDPMScheduler")]
    return chosen.from_config(public(config))


def whole_model(model: nn.Module, for_all: bool = True) -> nn.Module:
    """A model of its own with all weights where this one is in shards, gathered tensor by tensor over the CPU; else the
    model itself. ``for_all``: on every rank; else on rank 0, and the others keep what they have."""
    if not sharding.is_sharded(model):
        return model
    from .pruned_unet import build

    device = next(model.parameters()).device
    gather = (lambda tensor: sharding.whole(tensor.detach()).cpu()) if for_all else sharding.whole_on_rank_0
    tensors = {name: gather(tensor) for name, tensor in model.state_dict().items()}
    return build(model.config, tensors).to(device) if for_all or parallel.is_writer() else model


def _line(error: BaseException) -> str:
    return one_line(error, 160)
