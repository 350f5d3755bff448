"""Images in: folders with all sorts of files, data sets, CIFAR-10, the options of each, batches by step number."""

import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from prunedm import data, inputs, sources, training
from prunedm import recipe as recipes
from prunedm.recipe import Data, RecipeError

FORMATS = ("png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm")


def load(source, shape=(1, 8, 8), **options) -> data.Images:
    return data.load(Data(source=str(source), **options), shape)


def noise(seed: int, height: int, width: int, channels: int = 3) -> Image.Image:
    """Coarse noise, which lossy formats keep nearly as it is."""
    cells = np.random.default_rng(seed).integers(0, 255, (height // 4 + 1, width // 4 + 1, channels), dtype=np.uint8)
    return Image.fromarray(cells.squeeze()).resize((width, height), Image.Resampling.BICUBIC)


def everything(images: data.Images) -> list[bytes]:
    """All images of both parts, in an order of their own."""
    return sorted(image.numpy().tobytes() for image in (*images.train, *images.held_out))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """Twenty colour images, twice as wide as high."""
    folder = tmp_path_factory.mktemp("wide")
    for i in range(20):
        noise(i, 16, 32).save(folder / f"{i:02}.png")
    return folder


# --- what there was ----------------------------------------------------------------------------
def test_the_bundled_set():
    images = load("bundled", (1, 28, 28))
    assert images.train.shape == (12_000, 1, 28, 28) and images.held_out.shape == (3_000, 1, 28, 28)
    labels, held_labels = data.load_bundled_labels()
    assert labels.bincount().tolist() == [1200] * 10 and held_labels.bincount().tolist() == [300] * 10
    with pytest.raises(ValueError, match=r"data\.source=bundled"):
        load("bundled", (3, 32, 32))


def test_a_folder_skips_and_names_broken_files(image_folder):
    images = load(image_folder)
    assert len(images.train) == 36 and len(images.held_out) == 4
    assert [line.partition(":")[0] for line in images.skipped] == ["broken.png"]


def test_a_folder_is_split_as_ever(image_folder):
    """Bit for bit what the first version held out, which kept a list, stacked it and indexed it."""
    files = sorted(path for path in image_folder.glob("*.png") if path.name != "broken.png")
    fitted = [np.asarray(ImageOps.fit(Image.open(path).convert("L"), (8, 8))) for path in files]
    order = torch.randperm(40, generator=data.generator(0, "split"))
    expected = torch.from_numpy(np.stack(fitted))[order, None]
    images = load(image_folder)
    assert torch.equal(images.held_out, expected[:4]) and torch.equal(images.train, expected[4:])


def test_colour_and_alpha_become_what_the_model_expects(tmp_path):
    for i, mode in enumerate(["RGB", "RGBA", "L", "P", "1", "LA", "CMYK"]):
        Image.new(mode, (9, 7)).save(tmp_path / (f"{i}.png" if mode != "CMYK" else "6.jpg"))
    for channels in (1, 3, 4):
        images = load(tmp_path, (channels, 8, 8))
        assert images.shape == (channels, 8, 8) and len(images.train) == 6 and not images.skipped
    with pytest.raises(ValueError, match="2 image channels"):
        load(tmp_path, (2, 8, 8))


@pytest.mark.parametrize("files", [0, 1])
def test_too_few_images_are_said(tmp_path, files):
    for i in range(files):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=f"holds {files} readable images"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        load(tmp_path / "none")


# --- formats -----------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_hold_the_same_picture(tmp_path, suffix):
    for i in range(3):
        noise(i, 32, 32, 1).convert("L" if suffix == "gif" else "RGB").save(tmp_path / f"{i}.{suffix}")
    images = load(tmp_path, (3, 32, 32), held_out=0.5)
    assert len(images.train) + len(images.held_out) == 3 and not images.skipped
    decoded = [np.asarray(Image.open(tmp_path / f"{i}.{suffix}").convert("RGB")) for i in range(3)]
    assert everything(images) == sorted(picture.transpose(2, 0, 1).tobytes() for picture in decoded)
    assert np.abs(decoded[0][..., 0].astype(int) - np.asarray(noise(0, 32, 32, 1))).mean() < 6


def test_suffixes_are_those_that_pillow_opens_by_itself():
    suffixes, formats = sources.readable()
    assert {f".{name}" for name in (*FORMATS, "jpg", "tif", "pgm", "jp2", "ico", "tga")} <= suffixes
    assert not {".eps", ".ps", ".h5", ".mpg", ".pdf", ".txt"} & suffixes and "EPS" not in formats


def test_a_film_gives_its_first_frame_and_a_turned_photograph_stands_upright(tmp_path):
    frames = [Image.new("L", (8, 8), grey) for grey in (200, 10, 20)]
    for suffix in ("gif", "webp", "tiff"):
        frames[0].save(tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:])
    assert all(abs(int(image.float().mean()) - 200) < 4 for image in load(tmp_path).train)
    turned, exif = Image.new("L", (8, 16)), Image.Exif()
    turned.paste(255, (0, 0, 8, 8))  # the upper half is white
    exif[274] = 6  # to be turned by 90 degrees clockwise: then the right half is
    folder = tmp_path / "turned"
    folder.mkdir()
    for i in range(2):
        turned.save(folder / f"{i}.png", exif=exif)
    image = load(folder, (1, 8, 16), resize="none").train[0, 0]
    assert image[:, 8:].min() == 255 and image[:, :8].max() == 0


def test_sixteen_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    for name in ("a.png", "b.tiff", "c.ppm"):
        Image.fromarray(ramp).save(tmp_path / name)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "d.tiff")
    images = load(tmp_path)
    expected = (ramp >> 8).astype(np.uint8).tobytes()
    assert everything(images) == [expected] * 3
    assert images.skipped == ["d.tiff: has pixels of mode F, whose range is not known; save it with 8 or 16 bits"]


# --- what must not crash -----------------------------------------------------------------------
def test_odd_things_in_a_folder_are_named_and_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    for i in range(3):
        noise(i, 12, 10).save(tmp_path / f"good{i}.png")
    whole = (tmp_path / "good0.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:-30])
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.new("L", (200, 200)).save(tmp_path / "bomb.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "inside.png").write_bytes(whole)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    (tmp_path / "notes.txt").write_text("no image")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "linked").write_bytes(whole)
    (tmp_path / "link.png").symlink_to(outside / "linked")
    (tmp_path / "round").symlink_to(tmp_path)  # never followed: there would be no end
    images = load(tmp_path)
    assert len(images.train) + len(images.held_out) == 5, "three good ones, one inside and one linked"
    names = [line.partition(":")[0] for line in images.skipped]
    broken = ["bomb", "dangling", "empty", "folder", "loop", "pipe", "script", "torn"]
    assert sorted(names) == sorted(f"{name}{'.jpg' if name == 'empty' else '.png'}" for name in broken)
    assert all("\n" not in line for line in images.skipped)
    assert "pipe.png: is no regular file" in images.skipped


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_and_folders_are_named(tmp_path, wide):  # pragma: no cover
    for path in wide.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "00.png").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    images = load(tmp_path)
    (tmp_path / "closed").chmod(stat.S_IRWXU)
    assert [line.partition(":")[0] for line in images.skipped] == ["closed", "00.png"]


def test_refused_permissions_are_named(tmp_path, wide, monkeypatch):
    """As above for whoever may read everything: the refusal is made here."""
    real_open, real_scan = Image.open, os.scandir
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes((wide / f"{i:02}.png").read_bytes())
    (tmp_path / "closed").mkdir()

    def refuse(path, real, **options):
        if Path(path).name in ("0.png", "closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(Image, "open", lambda path, **options: refuse(path, real_open, **options))
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, real_scan))
    images = load(tmp_path)
    assert [line.partition(":")[0] for line in images.skipped] == ["closed", "0.png"] and len(images.train) == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.sampled_from(FORMATS), st.data())
@settings(max_examples=150)
def test_no_altered_file_gets_past_the_reader(suffix, draw):
    """Whatever happens to a file's bytes, it is read or it is named; nothing else is raised."""
    buffer = io.BytesIO()
    noise(0, 12, 10).save(buffer, suffix.upper())
    raw = bytearray(buffer.getvalue())
    for _ in range(draw.draw(st.integers(1, 8))):
        raw[draw.draw(st.integers(0, len(raw) - 1))] = draw.draw(st.integers(0, 255))
    raw = raw[: draw.draw(st.integers(0, len(raw)))]
    skipped: list[str] = []
    entry = ("x", lambda: Image.open(io.BytesIO(bytes(raw)), formats=sources.readable()[1]))
    rows = data._read([entry], None, Data(source="x"), (3, 8, 8), skipped)
    assert len(rows) + len(skipped) == 1


def test_more_images_than_memory_are_refused_before_any_is_read(wide, monkeypatch):
    class Free:
        available = 100

    monkeypatch.setattr(data.psutil, "virtual_memory", Free)
    with pytest.raises(ValueError, match=r"20 images need .* GiB .*; set data\.limit=5"):
        load(wide, (1, 2, 5))


# --- options -----------------------------------------------------------------------------------
def test_resize_fit_crops_and_stretch_does_not(tmp_path):
    picture = Image.new("L", (32, 16))
    picture.paste(255, (8, 0, 24, 16))  # the middle half is white: all that a centre crop sees
    for i in range(2):
        picture.save(tmp_path / f"{i}.png")
    assert load(tmp_path, (1, 16, 16)).train.min() == 255
    stretched = load(tmp_path, (1, 16, 16), resize="stretch").train[0, 0].float()
    assert stretched[:, :2].max() < 20 and stretched[:, 6:10].min() > 235
    assert abs(stretched.mean() - 127.5) < 4


def test_resize_none_takes_the_exact_size_and_names_the_others(tmp_path):
    for i in range(3):
        noise(i, 8, 10).save(tmp_path / f"{i}.png")
    noise(3, 10, 8).save(tmp_path / "tall.png")
    images = load(tmp_path, (3, 8, 10), resize="none")
    assert images.skipped == ["tall.png: is 8x10 and resize=none takes 10x8 only"]
    whole = [np.asarray(Image.open(tmp_path / f"{i}.png")).transpose(2, 0, 1).tobytes() for i in range(3)]
    assert everything(images) == sorted(whole)
    with pytest.raises(ValueError, match=r"holds 0 readable images \(4 unreadable; the first: 0\.png: is 10x8"):
        load(tmp_path, (3, 4, 4), resize="none")


def test_random_crops_differ_between_images_and_not_between_loads(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (16, 1)))
    for i in range(12):
        ramp.save(tmp_path / f"{i}.png")
    first, again = (load(tmp_path, (1, 16, 16), crop="random") for _ in range(2))
    assert torch.equal(first.train, again.train) and torch.equal(first.held_out, again.held_out)
    left = first.train[:, 0, :, 0].float().mean(1)
    assert len(left.unique()) > 8 and left.min() >= 0 and first.train.max() <= 252
    widths = (first.train[:, 0, 0, -1].int() - first.train[:, 0, 0, 0].int()).abs()
    assert ((widths - 60).abs() < 4).all(), "a crop keeps the proportions"
    (tmp_path / "0.png").unlink()
    fewer = set(everything(load(tmp_path, (1, 16, 16), crop="random")))
    assert fewer <= set(everything(first)), "an image's crop does not depend on the others"


@pytest.mark.parametrize(("share", "held"), [(0.1, 2), (0.5, 10), (0.01, 1), (0.26, 5)])
def test_held_out_share(wide, share, held):
    images = load(wide, held_out=share)
    assert len(images.held_out) == held and len(images.train) == 20 - held
    assert everything(images) == everything(load(wide)), "each image is in one part, and once"


@given(st.integers(2, 25), st.integers(2, 25))
@settings(max_examples=15)
def test_a_larger_limit_takes_the_same_images_and_more(wide, a, b):
    few, many = (set(everything(load(wide, limit=limit))) for limit in sorted((a, b)))
    assert few <= many and len(few) == min(a, b, 20)


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_rows_are_put_in_order_in_place(count, seed):
    rows = np.random.default_rng(seed).integers(0, 255, (count, 2, 3), dtype=np.uint8)
    order = np.random.default_rng(seed + 1).permutation(count)
    expected = rows[order]
    data._reorder(rows, order.tolist())
    assert np.array_equal(rows, expected)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"resize": "stretch"}, "resize=stretch is not read by source=bundled"),
        ({"crop": "random"}, "crop=random is not read by source=bundled"),
        ({"held_out": 0.2}, "held_out=0.2 is not read by source=bundled; remove it or use a folder of images"),
        ({"limit": 10}, "limit=10 is not read by source=bundled"),
        ({"source": "cifar10", "held_out": 0.2}, "held_out=0.2 is not read by source=cifar10"),
        ({"source": "cifar10:/x", "held_out": 0.2}, "held_out=0.2 is not read by source=cifar10:/x"),
        ({"source": "x", "resize": "none", "crop": "random"}, "crop=random is not read by resize=none"),
        ({"source": "hf:a/b/c"}, "source=hf:a/b/c is not hf:owner/name"),
        ({"source": "hf:"}, "is not hf:owner/name"),
        ({"source": "x", "held_out": 0.6}, "data.held_out=0.6"),
        ({"source": "x", "held_out": 0}, "data.held_out=0"),
        ({"source": "x", "limit": 1}, "data.limit=1"),
        ({"source": "x", "resize": "crop"}, "data.resize='crop'"),
        ({"source": "x", "crop": "left"}, "data.crop='left'"),
    ],
)
def test_options_that_a_source_does_not_read_are_refused(document, says):
    with pytest.raises(RecipeError) as found:
        recipes.build({"data": document})
    assert says in str(found.value) and "\n" not in str(found.value)


def test_options_that_a_source_reads_are_taken():
    assert recipes.build({"data": {"flip": True, "batch_size": 3}}).data.kind == "bundled"
    for source, kind in (("x", "folder"), ("cifar10", "cifar10"), ("cifar10:x", "cifar10"), ("hf:a/b:test", "hub")):
        options = {"source": source, "resize": "stretch", "limit": 5, "flip": True}
        assert recipes.build({"data": options}).data.kind == kind


def test_folders_are_kept_by_their_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "cifar10").mkdir()
    expected = {"here": f"{tmp_path}/here", "cifar10": "cifar10", "cifar10:here": f"cifar10:{tmp_path}/here"}
    for source, kept in (expected | {"./cifar10": f"{tmp_path}/cifar10", "hf:a/b": "hf:a/b"}).items():
        recipe = recipes.build({"data": {"source": source}})
        assert inputs.absolute(recipe, tmp_path).data.source == kept


# --- CIFAR-10 ----------------------------------------------------------------------------------
def write_cifar10(folder: Path, images: int = 6) -> dict[str, np.ndarray]:
    """Six binary files as on the site of CIFAR-10, with fewer records; what they hold, ``[N, 3, 32, 32]``."""
    folder.mkdir(parents=True)
    rng, held = np.random.default_rng(0), {}
    for name in (*sources.CIFAR10_TRAIN, sources.CIFAR10_TEST):
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, (images, 1), dtype=np.uint8)
        np.concatenate([labels, pixels], 1).tofile(folder / name)
        held[name] = pixels.reshape(-1, 3, 32, 32)
    return held


def test_cifar10_is_read_from_its_binary_files(tmp_path):
    written = write_cifar10(tmp_path / sources.CIFAR10_FOLDER)
    for root in (tmp_path, tmp_path / sources.CIFAR10_FOLDER):
        images = load(f"cifar10:{root}", (3, 32, 32))
        train = np.concatenate([written[name] for name in sources.CIFAR10_TRAIN])
        assert np.array_equal(images.train, train) and np.array_equal(images.held_out, written["test_batch.bin"])
    assert load(f"cifar10:{tmp_path}", (3, 32, 32), resize="none").shape == (3, 32, 32)


def test_cifar10_fits_other_models_and_reads_its_options(tmp_path):
    written = write_cifar10(tmp_path / sources.CIFAR10_FOLDER)
    images = load(f"cifar10:{tmp_path}", (1, 28, 28))
    first = Image.fromarray(written["data_batch_1.bin"][0].transpose(1, 2, 0))
    assert np.array_equal(images.train[0, 0], np.asarray(ImageOps.fit(first.convert("L"), (28, 28))))
    assert not torch.equal(load(f"cifar10:{tmp_path}", (1, 16, 28), crop="random").train, images.train[:, :, :16])
    few = load(f"cifar10:{tmp_path}", (3, 32, 32), limit=12)
    assert len(few.train) == 10 and len(few.held_out) == 2
    least = load(f"cifar10:{tmp_path}", (3, 16, 16), limit=2)
    assert len(least.train) == 1 == len(least.held_out)
    with pytest.raises(ValueError, match=r"data\.resize=none: CIFAR-10 images are 32x32"):
        load(f"cifar10:{tmp_path}", (3, 28, 28), resize="none")


def test_damaged_cifar10_files_are_named(tmp_path):
    write_cifar10(tmp_path / "a")
    path = tmp_path / "a" / "data_batch_3.bin"
    whole = path.read_bytes()
    for broken in (whole[:-1], b"", b"\xff" + whole[1:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"data_batch_3\.bin is no CIFAR-10 file of 3073-byte records; delete"):
            load(f"cifar10:{tmp_path / 'a'}", (3, 32, 32))


def test_cifar10_is_downloaded_where_it_is_not_there(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils

    asked = []

    def download(url, root, md5):
        asked.append((url, root, md5))
        write_cifar10(Path(root) / sources.CIFAR10_FOLDER)

    monkeypatch.setattr(utils, "download_and_extract_archive", download)
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        assert len(load("cifar10", (3, 32, 32)).train) == 30
    assert asked == [(sources.CIFAR10_URL, str(tmp_path / ".cache/prunedm"), sources.CIFAR10_MD5)]


def test_cifar10_without_a_network_is_one_line(tmp_path, monkeypatch):
    import torchvision.datasets.utils as utils

    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(utils, "download_and_extract_archive", fail)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(no route\); unpack https://\S+ there$"):
        load(f"cifar10:{tmp_path}", (3, 32, 32))


# --- Hugging Face datasets ---------------------------------------------------------------------
def test_without_datasets_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    for source in (str(tmp_path), "hf:owner/name"):
        with pytest.raises(ValueError, match="needs a package that is not here: pip install datasets"):
            load(source)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A dataset of twelve images, one of them broken, and the folders that hold it."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not here (requirements-extra.txt)")
    folder = tmp_path_factory.mktemp("hf")
    encoded = []
    for i in range(12):
        buffer = io.BytesIO()
        noise(i, 16, 16).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue() if i != 5 else b"broken", "path": None})
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    table = datasets.Dataset.from_dict({"label": list(range(12)), "picture": encoded}, features=features)
    table.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": table, "test": table.select(range(4))}).save_to_disk(folder / "splits")
    datasets.DatasetDict({"a": table, "b": table}).save_to_disk(folder / "no-train")
    table.select_columns(["label"]).save_to_disk(folder / "no-images")
    return folder


def test_a_saved_dataset_is_read(saved):
    images = load(saved / "one", (3, 16, 16))
    assert len(images.train) == 10 and len(images.held_out) == 1
    assert len(images.skipped) == 1 and images.skipped[0].startswith("row 5: cannot identify")
    expected = [np.asarray(noise(i, 16, 16)).transpose(2, 0, 1).tobytes() for i in range(12) if i != 5]
    assert everything(images) == sorted(expected)
    assert len(everything(load(saved / "one", limit=6))) in (5, 6)
    assert everything(load(saved / "splits", (3, 16, 16))) == sorted(expected), "the split train is taken"
    assert len(everything(load(saved / "splits" / "test"))) == 4


def test_a_saved_dataset_that_cannot_be_used_says_why(saved, tmp_path):
    with pytest.raises(ValueError, match=r"has the splits a, b; name one, as in .*no-train/a$"):
        load(saved / "no-train")
    with pytest.raises(ValueError, match=r"has no column of images \(columns: label\); cast one"):
        load(saved / "no-images")
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=r"cannot be loaded .*; save it again with save_to_disk"):
        load(tmp_path)


def test_values_that_are_pil_images_are_a_column_of_images(saved, monkeypatch):
    import datasets

    table = datasets.load_from_disk(str(saved / "no-images"))
    table.set_transform(lambda rows: rows | {"drawn": [noise(i, 8, 8) for i in rows["label"]]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    expected = [np.asarray(noise(i, 8, 8)).transpose(2, 0, 1).tobytes() for i in range(12)]
    assert everything(load("hf:owner/name", (3, 8, 8))) == sorted(expected)


def test_a_hub_dataset_asks_the_hub_for_its_split(saved, monkeypatch, tmp_path):
    import datasets

    asked = []

    def hub(name, split, trust_remote_code):
        asked.append((name, split, trust_remote_code))
        return datasets.load_from_disk(str(saved / "one"))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load("hf:owner/name:test").name == "name:test" and load("hf:owner/name").name == "name"
    assert asked == [("owner/name", "test", False), ("owner/name", None, False)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"owner/name is a folder here too; give it as \./owner/name"):
        load("hf:owner/name")


def test_a_hub_dataset_without_a_network_is_one_line(saved, monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("the hub\ncannot be reached")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"cannot be loaded \(the hub cannot be reached\); check the name and the"):
        load("hf:owner/name")


# --- batches -----------------------------------------------------------------------------------
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


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 200), min_size=1, max_size=4))
@settings(max_examples=25)
def test_flips_mirror_some_images_by_seed_and_step(seed, steps):
    images = torch.arange(48, dtype=torch.uint8).reshape(8, 1, 2, 3)
    kept = images.clone()
    plain, flipped = data.Batches(images, 4, seed), data.Batches(images, 4, seed, flip=True)
    for step in steps:
        before, after = plain.at(step), flipped.at(step)
        assert torch.equal(after, data.Batches(images, 4, seed, flip=True).at(step))
        mirrored = (after != before).flatten(1).any(1)
        assert torch.equal(after[mirrored], before[mirrored].flip(-1))
    assert torch.equal(images, kept), "the data set itself is never touched"


def test_half_of_the_images_are_mirrored_and_a_task_does_as_its_recipe_says():
    from diffusers import DDPMScheduler

    images = torch.arange(3, dtype=torch.uint8).expand(64, 1, 1, 3).contiguous()
    batches = data.Batches(images, 64, seed=0, flip=True)
    share = torch.stack([batches.at(step)[:, 0, 0, 0] > -1 for step in range(40)]).float().mean()
    assert abs(share - 0.5) < 0.05
    for flip in (False, True):
        task = training.Task.of(recipes.build({"data": {"flip": flip}}), DDPMScheduler(), images, torch.device("cpu"))
        assert task.batches.flip is flip
