"""Packed files: every bit comes back, a stranger can decode them by their own words, and no damage passes."""

import hashlib
import json
import math
import random
import struct
from contextlib import suppress
from itertools import combinations
from unittest.mock import patch

import pytest
import torch
from conftest import make_unet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from prunedm import packed, pattern

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PATTERNS = [(1, 2), (2, 4), (3, 4), (1, 4), (2, 8), (4, 8), (7, 16), (8, 16), (15, 16), (5, 7)]


def any_bits(shape, dtype, seed):
    """All bit patterns: NaN with payloads, infinities, -0.0 and subnormal numbers among them."""
    limits = torch.iinfo(INTEGERS[dtype.itemsize])
    bits = torch.randint(limits.min, limits.max, shape, generator=torch.Generator().manual_seed(seed))
    bits.view(-1)[:: max(1, bits.numel() // 5)] = limits.min  # -0.0
    return bits.to(INTEGERS[dtype.itemsize]).view(dtype)


def sparse(weight, n, m, seed=0):
    """The weight with N of each M kept at random, the rest 0."""
    groups = pattern.group(weight, m)
    mask = pattern.keep(torch.rand(groups.shape, generator=torch.Generator().manual_seed(seed)), n)
    return pattern.ungroup(torch.where(mask, groups, torch.zeros((), dtype=weight.dtype)), weight.shape)


def same(found, wanted):
    """Bit by bit."""
    view = INTEGERS[wanted.itemsize]
    return found.dtype == wanted.dtype and found.is_contiguous() and torch.equal(found.view(view), wanted.view(view))


@st.composite
def layers(draw):
    """Shape, N and M of a layer: linear, 1-D, 2-D or 3-D convolution, up to 40 output channels."""
    n, m = draw(
        st.sampled_from(PATTERNS) | st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))
    )
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3), (2, 3), (3,), (1, 2, 2)]))
    return (draw(st.integers(1, 40)), m * draw(st.integers(1, 3)), *kernel), n, m


@given(layers(), st.sampled_from(FLOATS), st.sampled_from([1, 200, packed.CHUNK]), st.integers(0, 999))
@example(((33, 16, 3, 3), 2, 4), torch.float16, 1, 0)  # seams between chunks of eight channels
@example(((9, 16), 8, 16), torch.float32, 1, 0)  # codes of 14 bits
@settings(max_examples=120)
def test_every_bit_comes_back(tmp_path_factory, layer, dtype, chunk, seed):
    shape, n, m = layer
    path = tmp_path_factory.mktemp("packed") / "unet.safetensors"
    tensors = {
        "a.weight": sparse(any_bits(shape, dtype, seed), n, m, seed),
        "a.bias": any_bits(shape[:1], dtype, seed + 1),
        "b.weight": any_bits(shape, dtype, seed + 2),
        "count": torch.tensor(3),
        "flags": torch.tensor([True, False]),
    }
    packed.write(path, tensors, {"a": f"{n}:{m}"}, {})
    with patch.object(packed, "CHUNK", chunk):
        found = packed.read(path)
    assert list(found) == list(tensors)
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("n, m", PATTERNS)
def test_codes_are_ranks_in_the_list_of_combinations(n, m):
    subsets = list(combinations(range(m), n))
    chosen = subsets if len(subsets) <= 300 else random.Random(0).sample(subsets, 300)
    kept = torch.tensor([[place in subset for place in range(m)] for subset in chosen])
    planes = packed._encode(kept, packed.Pattern(n, m))
    assert planes.shape == (math.ceil(math.log2(len(subsets))), math.ceil(len(chosen) / 8))
    assert [code_of(planes.tolist(), group) for group in range(len(chosen))] == [subsets.index(s) for s in chosen]


def code_of(planes, group):
    return sum((plane[group // 8] >> (7 - group % 8) & 1) << bit for bit, plane in enumerate(planes))


# --- a decoder that knows only safetensors and the words of the manifest ------------------------
def stranger(path):
    """Name to (shape, numbers in row-major order), in plain Python."""
    content = path.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:begin])
    manifest = json.loads(header["__metadata__"]["manifest"])

    def raw(name):
        first, last = header[name]["data_offsets"]
        code = {"F32": "f", "F16": "e", "I8": "b", "U8": "B"}[header[name]["dtype"]]
        return [number for (number,) in struct.iter_unpack("<" + code, content[begin + first : begin + last])]

    found = {}
    for name, entry in manifest["tensors"].items():
        shape = entry["shape"]
        numbers = raw(name) if entry["kind"] == "dense" else grouped(entry, raw(f"{name}.values"), raw(f"{name}.codes"))
        if entry["stored"] != entry["dtype"]:
            inner, scale = math.prod(shape[1:]), raw(f"{name}.scale")
            numbers = [number * scale[i // inner] for i, number in enumerate(numbers)]
        found[name] = (shape, numbers)
    digest = manifest["sha256"]
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    return found


def grouped(entry, values, codes):
    """The dense numbers of one N:M tensor in row-major order."""
    out, channels, *kernel = entry["shape"]
    n, m, places, size = entry["n"], entry["m"], math.prod(kernel), math.ceil(entry["groups"] / 8)
    planes = [codes[bit * size : (bit + 1) * size] for bit in range(entry["bits"])]
    subsets = list(combinations(range(m), n))
    dense = [0.0] * (out * channels * places)
    for group in range(entry["groups"]):
        for value, position in zip(values[group * n :], subsets[code_of(planes, group)]):
            row, channel = divmod(group * m + position, channels)  # axis 1 stands last
            k, place = divmod(row, places)
            dense[(k * channels + channel) * places + place] = value
    return dense


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"int8": True}])
def test_a_stranger_decodes_a_file_by_its_own_words(tmp_path, options):
    torch.manual_seed(0)
    tensors = {
        "conv.weight": sparse(torch.randn(3, 8, 2, 3), 2, 4),
        "linear.weight": sparse(torch.randn(5, 14), 3, 7),
        "dense.weight": torch.randn(4, 3, 1, 1),
        "conv.bias": torch.randn(3),
    }
    path = tmp_path / "unet.safetensors"
    packed.write(path, tensors, {"conv": "2:4", "linear": "3:7"}, {}, **options)
    decoded = stranger(path)
    found = packed.read(path)
    assert decoded.keys() == found.keys() == tensors.keys()
    for name, (shape, numbers) in decoded.items():
        assert found[name].float().equal(torch.tensor(numbers).view(shape)), name
        assert found[name].float().allclose(tensors[name], atol=0.02), name


def test_the_manifest_explains_itself(tmp_path):
    path = tmp_path / "unet.safetensors"
    tensors = {"a.weight": sparse(torch.randn(2, 16, 3, 3), 2, 8)}
    written = packed.write(path, tensors, {"a": "2:8"}, {"sample_size": 32, "block_out_channels": (16, 32)})
    found = packed.manifest(path)
    assert found == written
    assert (found["format"], found["version"]) == ("prunedm-packed", 1)
    assert found["config"] == {"sample_size": 32, "block_out_channels": [16, 32]}
    assert found["tensors"]["a.weight"] == {
        "kind": "nm", "shape": [2, 16, 3, 3], "dtype": "float32", "stored": "float32",
        "pattern": "2:8", "n": 2, "m": 8, "groups": 36, "bits": 5,
    }  # fmt: skip
    for word in ("NAME.values", "NAME.codes", "NAME.scale", "sha256", "itertools.combinations"):
        assert any(word in sentence for sentence in found["how to decode"])


# --- groups that are not full, and groups that are too full --------------------------------------
def test_groups_with_fewer_non_zeros_and_negative_zeros(tmp_path):
    path = tmp_path / "unet.safetensors"
    weight = torch.tensor([[0.0, 0, 0, 0, 0, 0, 5, 0, -0.0, 7, -0.0, -0.0, 0, -0.0, 0, 9]])
    packed.write(path, {"a.weight": weight}, {"a": "2:4"}, {})
    found = packed.read(path)["a.weight"]
    assert found.equal(weight)
    # The third group has room for one -0.0 beside its 7, the first of them; the others become +0.0.
    assert torch.signbit(found).nonzero()[:, 1].tolist() == [8, 13]


def test_a_group_with_too_many_non_zeros_is_refused_by_name(tmp_path):
    path = tmp_path / "unet.safetensors"
    weight = sparse(torch.ones(2, 8), 2, 4)
    weight[1, 4:] = torch.tensor([1.0, float("nan"), 0, 3])
    with pytest.raises(packed.PackedError, match=r"mid\.conv\.weight: 1 of 4 groups hold more than 2 .* in 4; bake"):
        packed.write(path, {"mid.conv.weight": weight}, {"mid.conv": "2:4"}, {})
    assert list(tmp_path.iterdir()) == []
    packed.write(path, {"mid.conv.weight": weight}, {"mid.conv": "3:4"}, {})
    assert same(packed.read(path)["mid.conv.weight"], weight)


# --- damage ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small file, its path and its tensors."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "unet.safetensors"
    tensors = {"a.weight": sparse(torch.randn(8, 16, 3, 3), 2, 4), "b.weight": sparse(torch.randn(8, 16), 4, 8)}
    tensors |= {"a.bias": torch.randn(8), "c.weight": torch.randn(8, 2)}
    packed.write(path, tensors, {"a": "2:4", "b": "4:8"}, {"sample_size": 8})
    return path, tensors


def refused(path, content=None, **options):
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(packed.PackedError) as caught:
        packed.read(path, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_truncation_anywhere_is_refused(whole, tmp_path):
    content = whole[0].read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(content) - 1, *random.Random(0).sample(range(len(content)), 150)}:
        refused(tmp_path / "torn.safetensors", content[:length])
        refused(tmp_path / "torn.safetensors", content[:length], check=False)
    refused(tmp_path / "torn.safetensors", content + b"\0")
    refused(tmp_path / "absent.safetensors")


def test_a_flipped_byte_anywhere_is_refused(whole, tmp_path):
    content = whole[0].read_bytes()
    rng = random.Random(1)
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(8), *rng.sample(range(8, header), 400), *rng.sample(range(header, len(content)), 200)]
    places += [content.index(packed.manifest(whole[0])["sha256"].encode()) + i for i in range(0, 64, 7)]
    for place in places:
        altered = bytearray(content)
        altered[place] ^= rng.randrange(1, 256)
        refused(tmp_path / "altered.safetensors", altered)
        with suppress(packed.PackedError):  # unchecked it may pass, but no other error comes of it
            packed.read(tmp_path / "altered.safetensors", check=False)


def test_without_the_check_only_contradictions_are_refused(whole, tmp_path):
    content = bytearray(whole[0].read_bytes())
    content[content.index(whole[1]["a.bias"].numpy().tobytes())] ^= 1
    path = tmp_path / "altered.safetensors"
    assert "SHA-256" in refused(path, content)
    found = packed.read(path, check=False)
    assert any(not same(found[name], tensor) for name, tensor in whole[1].items())


def forge(source, path, change):
    """The file again with its manifest and tensors changed, under a SHA-256 that is right."""
    with safe_open(source, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["manifest"]) | {"sha256": "0" * 64}
    text = change(record, tensors)
    text = text if isinstance(text, str) else json.dumps(record, separators=(",", ":"))
    content = save(tensors, metadata={"manifest": text})
    path.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode()))


def test_the_forger_can_forge(whole, tmp_path):
    path = tmp_path / "forged.safetensors"
    forge(whole[0], path, lambda record, tensors: tensors["a.bias"].zero_() is None)
    assert not packed.read(path)["a.bias"].any()
    forge(whole[0], path, lambda record, tensors: record["tensors"]["a.weight"].update(n=2.0))
    assert same(packed.read(path)["a.weight"], whole[1]["a.weight"])


def set_entry(name, **values):
    return lambda record, tensors: record["tensors"][name].update(values)


def fill_codes(name, byte):
    return lambda record, tensors: tensors[f"{name}.codes"].fill_(byte) is None


def reshape(record, tensors, name, shape):
    record["tensors"][name]["shape"] = shape
    tensors[name] = tensors[name].reshape([int(side) for side in shape])


FORGERIES = {
    "version 2": lambda record, tensors: record.update(version=2),
    "another format": lambda record, tensors: record.update(format="npz"),
    "no config": lambda record, tensors: record.pop("config") and None,
    "a list as manifest": lambda record, tensors: "[]",
    "no sum": lambda record, tensors: record.pop("sha256") and None,
    "no JSON": lambda record, tensors: "{",
    "deep nesting": lambda record, tensors: "[" * 100_000,
    "a number of many digits": lambda record, tensors: json.dumps(record).replace("16", "1" * 5000, 1),
    "codes beyond the last rank": fill_codes("a.weight", 255),
    "codes beyond the last rank in 4:8": fill_codes("b.weight", 255),
    "a missing tensor": lambda record, tensors: tensors.pop("a.bias") is None,
    "missing codes": lambda record, tensors: tensors.pop("a.weight.codes") is None,
    "a tensor nobody speaks of": lambda record, tensors: tensors.update(x=torch.zeros(1)),
    "an entry less": lambda record, tensors: record["tensors"].pop("a.bias") and None,
    "a giant shape": set_entry("a.weight", shape=[2**40, 2**40, 3, 3]),
    "a giant dense shape": set_entry("a.bias", shape=[2**62]),
    "another shape of the same size": set_entry("a.weight", shape=[16, 8, 3, 3], groups=999),
    "a negative side": set_entry("a.bias", shape=[-8]),
    "a shape of true": lambda record, tensors: reshape(record, tensors, "c.weight", [8, 2, True]),
    "a shape of nine sides": lambda record, tensors: reshape(record, tensors, "c.weight", [8, 2, 1, 1, 1, 1, 1, 1, 1]),
    "a shape that is no list": set_entry("a.bias", shape=8),
    "another pattern": set_entry("a.weight", pattern="3:4"),
    "a pattern that is none": set_entry("a.weight", pattern="4:4"),
    "dense as a pattern": set_entry("a.weight", pattern="dense"),
    "another n": set_entry("a.weight", n=3),
    "another number of bits": set_entry("a.weight", bits=2),
    "an unknown dtype": set_entry("a.bias", dtype="float8", stored="float8"),
    "an odd mix of dtypes": set_entry("a.bias", stored="float16"),
    "another dtype than stored": set_entry("a.bias", dtype="int32", stored="int32"),
    "whole numbers in groups": set_entry("a.weight", dtype="int32", stored="int32"),
    "an unknown kind": set_entry("a.bias", kind="sparse"),
    "half the values": lambda record, tensors: tensors.update({"a.weight.values": torch.zeros(144, 2)}),
    "a name with a line feed": lambda record, tensors: tensors.update({"x\ny": torch.zeros(1)}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_a_file_that_contradicts_itself_is_refused_whatever_its_sum(whole, tmp_path, change):
    path = tmp_path / "forged.safetensors"
    forge(whole[0], path, change)
    assert "SHA-256" not in refused(path)
    refused(path, check=False)


def test_other_safetensors_are_refused_with_the_remedy(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    assert "no prunedm-packed manifest" in refused(path) and "export it again" in refused(path)
    with pytest.raises(packed.PackedError):
        packed.manifest(path)


# --- int8, casts, sizes ---------------------------------------------------------------------------
@given(layers(), st.integers(0, 99), st.sampled_from([1e-42, 1e-3, 1.0, 1e30]), st.sampled_from([1, packed.CHUNK]))
@settings(max_examples=40)
def test_int8_is_off_by_half_a_step_at_most(tmp_path_factory, layer, seed, size, chunk):
    shape, n, m = layer
    path = tmp_path_factory.mktemp("packed") / "unet.safetensors"
    torch.manual_seed(seed)
    weight = sparse(torch.randn(shape) * size, n, m, seed)
    weight[0] = 0
    tensors = {"a.weight": weight, "b.weight": torch.randn(3, 5) * size, "norm.weight": torch.randn(7)}
    tensors["table"] = torch.randn(2, 3)
    packed.write(path, tensors, {"a": f"{n}:{m}"}, {}, int8=True)
    with patch.object(packed, "CHUNK", chunk):
        found = packed.read(path)
    for name in ("a.weight", "b.weight"):
        with safe_open(path, "pt") as file:
            step = file.get_tensor(f"{name}.scale").double()
        largest, wrong = (w.double().abs().flatten(1).amax(1) for w in (tensors[name], found[name] - tensors[name]))
        assert (step <= largest / 127 * 1.000001 + 2.0**-149).all()  # the smallest float
        assert (wrong <= step * 0.50001).all() and found[name].dtype == torch.float32
    assert (found["a.weight"] == 0)[weight == 0].all()
    assert all(same(found[name], tensors[name]) for name in ("norm.weight", "table"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_refuses_what_it_cannot_hold(tmp_path, bad):
    weight = torch.tensor([[1.0, bad], [3, 4]])
    with pytest.raises(packed.PackedError, match=r"a\.weight holds NaN or infinity"):
        packed.write(tmp_path / "x", {"a.weight": weight}, {}, {}, int8=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cast_takes_all_floats_and_nothing_else(tmp_path, dtype):
    path = tmp_path / "unet.safetensors"
    tensors = {"a.weight": sparse(torch.randn(4, 8), 1, 4).double(), "a.bias": torch.randn(4), "n": torch.arange(3)}
    packed.write(path, tensors, {"a": "1:4"}, {}, dtype=dtype)
    found = packed.read(path)
    assert all(same(found[name], tensors[name].to(dtype)) for name in ("a.weight", "a.bias"))
    assert same(found["n"], tensors["n"])


def test_the_size_is_near_the_limit_and_the_limit_is_right(tmp_path):
    path = tmp_path / "unet.safetensors"
    tensors = {"a.weight": sparse(torch.randn(256, 128, 3, 3).half(), 2, 4), "a.bias": torch.randn(256).half()}
    groups = 256 * 128 * 9 // 4
    limit = groups * (2 * 2 + math.log2(6) / 8) + 256 * 2
    found = packed.write(path, tensors, {"a": "2:4"}, {})
    assert packed.information_limit(found) == pytest.approx(limit)
    assert path.stat().st_size < 1.02 * limit
    found = packed.write(path, tensors, {"a": "2:4"}, {}, int8=True)
    assert packed.information_limit(found) == pytest.approx(groups * (2 + math.log2(6) / 8) + 256 * (4 + 2))


# --- writing ----------------------------------------------------------------------------------
WEIGHT = torch.ones(2, 8)
REFUSALS = {
    "a layer that is not there": ({"a.weight": WEIGHT}, {"b": "2:4"}, {}, {}, r"b\.weight, which is not there"),
    "a pattern that is none": ({"a.weight": WEIGHT}, {"a": "4:2"}, {}, {}, "'4:2' must be N:M"),
    "channels that are no multiple": ({"a.weight": WEIGHT}, {"a": "2:3"}, {}, {}, r"a\.weight cannot be 2:3: 8 input"),
    "a vector": ({"a.weight": WEIGHT[0]}, {"a": "2:4"}, {}, {}, r"a\.weight cannot be 2:4: float32 \[8\] is no"),
    "whole numbers": ({"a.weight": WEIGHT.int()}, {"a": "2:4"}, {}, {}, r"a\.weight cannot be 2:4: int32"),
    "complex numbers": ({"a": WEIGHT.to(torch.complex64)}, {}, {}, {}, r"a is empty or of torch\.complex64"),
    "nothing": ({"a.weight": torch.zeros(0, 4)}, {}, {}, {"int8": True}, r"a\.weight is empty"),
    "a name that is taken": ({"a.weight": WEIGHT, "a.weight.scale": WEIGHT}, {}, {}, {"int8": True}, "is taken"),
    "the header's name": ({"__metadata__": WEIGHT}, {}, {}, {}, "__metadata__, which is taken"),
    "a config that is no JSON": ({"a": WEIGHT}, {}, {"x": WEIGHT}, {}, "not packed: .*JSON"),
    "a config with NaN": ({"a": WEIGHT}, {}, {"x": float("nan")}, {}, "not packed: .*JSON"),
    "an odd dtype": ({"a": WEIGHT}, {}, {}, {"dtype": torch.int8}, r"dtype=torch\.int8 is not supported"),
    "too large for float16": ({"a": WEIGHT * 1e6}, {}, {}, {"dtype": torch.float16}, "a holds numbers that"),
}


@pytest.mark.parametrize("tensors, patterns, config, options, why", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_packed_is_refused_and_the_old_file_stays(tmp_path, tensors, patterns, config, options, why):
    path = tmp_path / "unet.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(packed.PackedError, match=why) as caught:
        packed.write(path, tensors, patterns, config, **options)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "unet.safetensors"
    path.write_bytes(b"old")
    with (
        patch("os.fsync", side_effect=OSError(28, "No space left on device")),
        pytest.raises(OSError, match="No space"),
    ):
        packed.write(path, {"a": WEIGHT}, {}, {})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_views_tied_weights_and_dense_as_a_pattern(tmp_path):
    path = tmp_path / "unet.safetensors"
    base = torch.randn(6, 4)
    tensors = {"a.weight": base, "b.weight": base, "c.weight": base.t(), "d.weight": base[:, 1:3]}
    packed.write(path, tensors, {"a": "dense"}, {})
    found = packed.read(path)
    assert all(same(found[name], tensor.contiguous()) for name, tensor in tensors.items())


def test_what_is_read_is_a_copy_with_memory_of_its_own_size(whole, tmp_path):
    path = tmp_path / "unet.safetensors"
    path.write_bytes(whole[0].read_bytes())
    found = packed.read(path)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert all(same(found[name], tensor) for name, tensor in whole[1].items())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())


def test_a_whole_unet_gives_the_same_images_bit_by_bit(tmp_path):
    unet, other = make_unet(), make_unet()
    layers = {name: m for name, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    layers = {
        name: m for name, m in layers.items() if name.startswith(("down", "mid", "up")) and m.weight.shape[1] % 8 == 0
    }
    patterns = {name: "2:8" if "attentions" in name else "2:4" for name in layers}
    with torch.no_grad():
        for name, module in layers.items():
            module.weight.copy_(sparse(module.weight, *map(int, patterns[name].split(":"))))
        for parameter in other.parameters():
            parameter.fill_(float("nan"))
    path = tmp_path / "unet.safetensors"
    found = packed.write(path, unet.state_dict(), patterns, dict(unet.config))
    assert sum(entry["kind"] == "nm" for entry in found["tensors"].values()) == len(patterns) > 20
    other.load_state_dict(packed.read(path), strict=True)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        assert same(other(x, t).sample, unet(x, t).sample)


def test_the_same_tensors_make_the_same_file(whole, tmp_path):
    packed.write(tmp_path / "again.safetensors", whole[1], {"a": "2:4", "b": "4:8"}, {"sample_size": 8})
    assert (tmp_path / "again.safetensors").read_bytes() == whole[0].read_bytes()
