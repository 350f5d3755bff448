"""What this machine and installation are: for reports, ``doctor`` and the System page."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import __version__

PACKAGES = (
    "torch", "torchvision", "diffusers", "torch-pruning", "torch-fidelity", "accelerate", "safetensors",
    "huggingface_hub", "streamlit", "plotly", "pandas", "numpy", "scipy", "pillow", "pydantic", "pyyaml",
    "typer", "rich", "psutil", "filelock", "onnx", "onnxruntime",
)  # fmt: skip
SETUP = "run `make lab`, or pip install -r requirements.txt"


@dataclass
class Check:
    """One line of ``doctor``: what was looked at, what was found, and what to do if it is not well."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def versions() -> dict[str, str]:
    """Versions of what a run's result depends on."""
    own = {"prunedm": __version__, "python": platform.python_version()}
    return own | {package: _version(package) for package in PACKAGES}


@functools.cache  # looking all of them up takes 60 ms
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def machine() -> dict[str, str]:
    """Processor, memory and accelerators, in words."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": processor(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": ", ".join(gpus) or "none",
    }


def checks(runs_dir: Path) -> list[Check]:
    """All that a run needs, looked at one by one."""
    found = versions()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    packages = [Check(name, found[name] != "missing", found[name], SETUP) for name in PACKAGES]
    checked = [Check("python", supported, platform.python_version(), "use Python 3.10 to 3.13"), *packages]
    if found["torch"] != "missing":
        checked += _machine_checks()
    return checked + _asset_checks() + _disk_checks(runs_dir)


def _machine_checks() -> list[Check]:
    from .training import use_bf16
    from .unet import resolve_device

    here, device = machine(), resolve_device("auto")
    free = psutil.virtual_memory().available / 2**30
    bf16 = "yes" if use_bf16(device, "auto") else "no, fp32"
    return [
        Check("processor", True, here["processor"]),
        Check("memory", free > 3, f"{free:.1f} GiB free of {here['memory']}", "close programs: 3 GiB are needed"),
        Check("device", True, f"{device} (GPU: {here['gpu']}); bf16 training: {bf16}"),
    ]


def _asset_checks() -> list[Check]:
    from . import bundled

    assets = (bundled.MODEL, bundled.IMAGES, bundled.FEATURE_NETWORK, bundled.REFERENCE, bundled.EVALUATIONS)
    restore = "restore it from the repository"
    return [Check(f"assets/{a.name}", a.exists(), "there" if a.exists() else "missing", restore) for a in assets]


def _disk_checks(runs_dir: Path) -> list[Check]:
    existing = next(p for p in (runs_dir, *runs_dir.absolute().parents) if p.exists())
    free, writable = shutil.disk_usage(existing).free / 2**30, os.access(existing, os.W_OK)
    return [
        Check("disk", free > 1, f"{free:.1f} GiB free for {runs_dir}", "free some space or use --runs-dir"),
        Check("runs folder", writable, "writable" if writable else "not writable", "use --runs-dir"),
    ]


def processor() -> str:
    """The processor's name and how many cores this machine has, in words."""
    return f"{_processor()}, {os.cpu_count()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
