"""Small models, images and recipes, made once."""

from __future__ import annotations

import datetime
import gc
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from sqlalchemy import event
from sqlalchemy.engine import Engine

from prunedm import recipe as recipes
from prunedm import unet as unets
from prunedm.recipe import Recipe

TURNS = 20


def pytest_configure() -> None:
    """Slow tests take turns, a twentieth a day, and so do the cases of a test that is ``in_turn(n)``, every n-th a day
    and at least one. PRUNEDM_SLOW=all (make nightly) runs every one, PRUNEDM_SLOW=none no slow one and the first cases.

    The day is read once, for all worker processes.
    """
    os.environ.setdefault("PRUNEDM_SLOW", str(datetime.date.today().toordinal()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    turn = os.environ["PRUNEDM_SLOW"]
    if turn == "all":
        return
    day = int(turn) if turn.isdecimal() else 0
    slow = [item for item in items if item.get_closest_marker("slow")]
    left_out = set(slow) - set(slow[day % TURNS :: TURNS] if turn.isdecimal() else [])
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("in_turn") and item not in slow:  # a turn within turns would leave some out for ever
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_one in cases.values():
        every = min(len(of_one), of_one[0].get_closest_marker("in_turn").args[0])
        left_out |= set(of_one) - set(of_one[day % every :: every])
    if left_out:
        config.hook.pytest_deselected(items=sorted(left_out, key=items.index))
        items[:] = [item for item in items if item not in left_out]


settings.register_profile("shared machines", deadline=None)  # a slow machine is no failure
settings.load_profile("shared machines")


def make_unet(**changes):
    """A UNet2DModel of about 60 k parameters on 8x8 images with attention."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4,
        "block_out_channels": (16, 32), "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DModel(**(config | changes)).eval()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory) -> None:
    """Reference statistics of the tests' images go into a folder of their own."""
    os.environ["PRUNEDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Files and databases are written but not flushed to the disk, of which no test can tell, and a tenth of whose time
    it takes."""

    def without_flushes(connection, record) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", without_flushes)
    flush, os.fsync = os.fsync, lambda file: None
    yield
    os.fsync = flush
    event.remove(Engine, "connect", without_flushes)


@pytest.fixture(scope="session", autouse=True)
def imported_for_good() -> Iterator[None]:
    """What is imported is not looked at again by each collection of garbage, which takes 0.3 s with it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()  # else onnx's bindings complain of leaks at the end


@pytest.fixture(scope="session", autouse=True)
def configured() -> None:
    """As app/.streamlit/config.toml says, which AppTest does not read; the engine's tests need no Streamlit."""
    if find_spec("streamlit") is None:
        return
    from streamlit import config

    config.set_option("server.address", "127.0.0.1")
    config.set_option("runner.magicEnabled", False)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """An empty runs folder of a lab of its own that nobody watches, without the background import (all is imported
    here)."""
    from app import lab, pace
    from prunedm.jobs import Jobs

    monkeypatch.setenv("PRUNEDM_RUNS", str(tmp_path))
    monkeypatch.setattr(pace, "_watchers", {})
    monkeypatch.setattr(Jobs, "warm_up", lambda self, *first: None)
    yield tmp_path
    lab._jobs.clear()


@pytest.fixture
def open_folds():
    """Opens (or closes) "More settings" of sections of Launch, whose widgets are drawn only then."""

    def change(app, *sections: str, is_open: bool = True):
        for section in sections:
            app.session_state[f"launch.fold.{section}"] = is_open
        app.run()
        assert not app.exception, app.exception
        return app

    return change


@pytest.fixture
def tiny_unet():
    return make_unet()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A diffusers pipeline folder with the tiny UNet."""
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("model") / "tiny"
    unets.save(make_unet(), DDPMScheduler(), folder, {"variant": "dense"})
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Forty grey images of 10x12 and one broken file."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (10, 12), dtype=np.uint8)).save(folder / f"{i:02}.png")
    (folder / "broken.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory) -> Path:
    """A file with the architecture of Inception and no knowledge, whose features tell images apart."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    weights = {}

    class Recorder(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            weights.update(self.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        Recorder("recorder", ["2048"])
    for weight in weights.values():
        if weight.ndim == 4:
            weight.mul_(6**0.5)  # torch's default times this is He's: without it the features vanish, at 1e-7
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="session")
def micro(model_folder: Path, image_folder: Path):
    """A recipe builder: the whole pipeline in a few seconds."""

    def build(**changes) -> Recipe:
        base = {
            "name": "micro",
            "device": "cpu",
            "model": {"source": str(model_folder)},
            "data": {"source": str(image_folder), "batch_size": 8},
            "prune": {"target": 0.3, "finetune_steps": 6},
            "mask": {"steps": 6, "recover_steps": 6},
            "eval": {"images": 8, "steps": 2},
        }
        return recipes.build(recipes.merge(base, changes))

    return build
