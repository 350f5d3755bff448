"""SSIM against a plain loop over windows, PSNR by hand, and what does not pair."""

import math

import numpy as np
import pytest
import torch

from prunedm import faithfulness
from prunedm.seeds import generator


def images(count=3, channels=1, side=20, name="a"):
    return torch.randint(256, (count, channels, side, side), generator=generator(0, name), dtype=torch.uint8)


def slow_ssim(a, b, side):
    """Eq. 13 of Wang et al. 2004 at each window, averaged over windows and colours; float64."""
    at = np.arange(side) - side // 2
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for x, y in zip(a.numpy().astype(np.float64), b.numpy().astype(np.float64)):
        for i in range(x.shape[0] - side + 1):
            for j in range(x.shape[1] - side + 1):
                p, q = x[i : i + side, j : j + side], y[i : i + side, j : j + side]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return np.mean(found)


@pytest.mark.parametrize(("channels", "side", "window"), [(1, 16, 11), (3, 14, 11), (1, 8, 7), (1, 5, 5), (1, 11, 11)])
def test_ssim_equals_a_loop_over_windows(channels, side, window):
    a, noise = images(2, channels, side), images(2, channels, side, "b")
    near = (a.int() + noise.int() // 8 - 16).clamp(0, 255).to(torch.uint8)
    flat = torch.full_like(a, 77)
    assert faithfulness.window_side(a) == window
    for b in (near, noise, flat, 255 - a):
        expected = [slow_ssim(x, y, window) for x, y in zip(a, b)]
        assert np.allclose(faithfulness.ssim(a, b).numpy(), expected, atol=1e-10)


def test_ssim_is_one_for_the_same_symmetric_bounded_and_falls_with_noise():
    a, b = images(), images(name="b")
    assert torch.allclose(faithfulness.ssim(a, a), torch.ones(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(faithfulness.ssim(a, b), faithfulness.ssim(b, a), atol=1e-12)
    assert faithfulness.ssim(a, 255 - a).min() >= -1 and faithfulness.ssim(a, b).max() < 1
    noise = torch.randn(a.shape, generator=generator(0, "noise"))
    noisy = [(a + sigma * noise).round().clamp(0, 255).to(torch.uint8) for sigma in (5, 20, 60, 120)]
    found = [faithfulness.compare_samples(a, other) for other in noisy]
    for key in ("ssim", "psnr"):
        values = [f[key] for f in found]
        assert values == sorted(values, reverse=True)


def test_psnr_by_hand_and_identical_images_have_none():
    a = torch.full((3, 1, 8, 8), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 5
    b[2, :, :4] += 10
    found = faithfulness.compare_samples(a, b)
    expected = [20 * math.log10(255 / 5), 10 * math.log10(255**2 / 50)]
    assert found["per_image"]["psnr"] == [None, *(pytest.approx(v) for v in expected)]
    assert found["psnr"] == pytest.approx(sum(expected) / 2) and found["identical"] == 1 and found["images"] == 3
    same = faithfulness.compare_samples(a, a)
    assert same["psnr"] is None and same["identical"] == 3 and same["ssim"] == pytest.approx(1)
    assert same["feature_distance"] is None and same["per_image"]["feature_distance"] is None


def test_chunks_change_nothing(monkeypatch):
    a, b = images(7), images(7, name="b")
    whole = faithfulness.compare_samples(a, b)
    monkeypatch.setattr(faithfulness, "CHUNK", 3)
    assert faithfulness.compare_samples(a, b)["per_image"]["ssim"] == pytest.approx(whole["per_image"]["ssim"])


def test_feature_distance_is_the_mean_of_the_pairs():
    a, features = images(2), torch.zeros(2, 4)
    other = torch.tensor([[3.0, 4, 0, 0], [0, 0, 0, 1]])
    found = faithfulness.compare_samples(a, a, features, other)
    assert found["per_image"]["feature_distance"] == [5, 1] and found["feature_distance"] == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((images(2), images(3)), "must be pairs .* same seeds"),
        ((images(0), images(0)), "must be pairs"),
        ((images(2), images(2).float()), "must be uint8; use diffusion.to_uint8"),
        ((images(2), images(2), torch.zeros(2, 4)), "given for one set .* extract the other's"),
        ((images(2), images(2), torch.zeros(2, 4), torch.zeros(2, 5)), "use one extractor for both"),
        ((images(2), images(2), torch.zeros(3, 4), torch.zeros(3, 4)), r"must be \[N, D\] for 2 pairs"),
    ],
)
def test_what_does_not_pair_is_refused_in_one_line(arguments, line):
    with pytest.raises(ValueError, match=line) as caught:
        faithfulness.compare_samples(*arguments)
    assert "\n" not in str(caught.value)
