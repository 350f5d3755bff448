"""N:M weights as one packed file: the kept values, and which ones were kept as a number of few bits.

A safetensors file whose ``__metadata__`` holds a JSON manifest that says how to decode it (``WORDS``) and
states the SHA-256 of the whole file. A pruned ``-0.0`` reads back as ``+0.0``; all kept values, ``-0.0`` and the
payload of a NaN included, come back bit by bit, and so does every dense tensor. Nothing is a pickle.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import pattern
from .stage_recipes import Pattern, parse_pattern
from .store import write_atomic
from .untrusted import UntrustedError, one_line, require_header

FORMAT, VERSION = "prunedm-packed", 1
WORDS = (
    "A tensor of kind dense is stored under its own name.",
    "A tensor of kind nm is a weight [K, C, ...] in groups of m along C: move axis 1 to the end and read row by row; "
    "every m numbers are a group. Each group keeps n numbers, the other m - n are 0 (and were 0 or -0.0).",
    "NAME.values [groups, n] holds the kept numbers of each group, in their order.",
    "NAME.codes [bits, ceil(groups / 8)] (uint8) holds one code a group: row b has bit b of every code, b = 0 being "
    "the lowest; a byte has eight groups, the first in the highest bit; unused bits at the end are 0.",
    "The code is the place, counted from 0, of the group's kept positions in the lexicographic list of all n-subsets "
    "of 0 .. m-1: for 2:4 that is 01, 02, 03, 12, 13, 23 (Python: list(itertools.combinations(range(m), n))[code]).",
    "Where stored is not dtype, the numbers are stored * NAME.scale [K], one float32 factor for each index of axis 0.",
    "sha256 is that of this whole file with its own 64 digits replaced by 64 zeros.",
)
DTYPES = {  # torch's names to those of safetensors
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # that hold a float of so many bytes
LARGEST_ROW = 2**28  # weights of one output channel: eight such rows have places in int32
CHUNK = 2**17  # kept values unpacked at once: their places stay in the second-level cache
LOOKUP_BITS = 12  # of one look-up in the table of places, unless a single code is longer
BLOCK = 2**25  # bytes asked for at once
SEAL = re.compile(rb'"manifest":"{\\"sha256\\":\\"([0-9a-f]{64})\\"')  # in the header, where nothing else looks so


class PackedError(ValueError):
    """Tensors that cannot be packed, or a packed file that is missing, torn or altered, in one line."""


def write(
    path: Path,
    tensors: dict[str, Tensor],
    patterns: dict[str, str],
    config: dict[str, Any],
    dtype: torch.dtype | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    """Pack a UNet's state dict into one file, atomically; returns its manifest.

    ``patterns``: layer name (without ``.weight``) to ``N:M``, 1 <= N < M <= 16. ``dtype``: float32, float16
    or bfloat16 for all floating tensors; None keeps theirs. ``int8``: all weights of two or more dimensions
    as int8, symmetric, with one float32 scale per output channel; they read back as float32.
    PackedError names the tensor that does not fit, above all a group with more than N non-zero weights.
    """
    from safetensors.torch import save

    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise PackedError(f"dtype={dtype} is not supported; give float32, float16, bfloat16 or None")
    entries: dict[str, Any] = {}
    stored: dict[str, Tensor] = {}
    try:
        wanted = {f"{layer}.weight": parse_pattern(text) for layer, text in patterns.items()}
        if lost := sorted(wanted.keys() - tensors.keys()):
            raise PackedError(f"a pattern is given for {lost[0]}, which is not there; name layers of these tensors")
        for name, tensor in tensors.items():
            entries[name], parts = _pack(name, tensor.detach().cpu(), wanted.get(name), dtype, int8)
            if clash := sorted((stored.keys() | {"__metadata__"}) & parts.keys()):
                raise PackedError(f"{name} would be stored as {clash[0]}, which is taken; rename it")
            stored |= parts
        record = {"sha256": "0" * 64, "format": FORMAT, "version": VERSION, "how to decode": WORDS}
        text = json.dumps(record | {"config": config, "tensors": entries}, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, PackedError) else PackedError(f"not packed: {error}") from None
    content = bytearray(save(stored, metadata={"manifest": text}))
    start = _seal(content)
    content[start : start + 64] = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, content)
    return manifest(path)


def _pack(
    name: str, tensor: Tensor, found: Pattern | None, dtype: torch.dtype | None, int8: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest's entry for a tensor, and what the file holds of it by name."""
    if not tensor.numel() or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise PackedError(f"{name} is empty or of {tensor.dtype}; drop it or convert it to a plain dtype")
    parts: dict[str, Tensor] = {}
    held = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    if int8 and tensor.is_floating_point() and tensor.dim() >= 2 and name.endswith(".weight"):
        held, parts[f"{name}.scale"] = _quantise(name, tensor)
    stored = str(held.dtype).removeprefix("torch.")
    if (held.isinf() & ~tensor.isinf()).any():
        raise PackedError(f"{name} holds numbers that {dtype} cannot; use bfloat16 or float32")
    entry = _entry(list(tensor.shape), "float32" if parts else stored, stored, found)
    if found:
        _check_weight(name, entry, found)
        kept = _kept(name, pattern.group(tensor if parts else held, found.m), found)
        parts[f"{name}.values"] = pattern.group(held, found.m)[kept].view(-1, found.n)
        parts[f"{name}.codes"] = _encode(kept, found)
    else:
        parts[name] = held.clone(memory_format=torch.contiguous_format)  # safetensors takes no shared memory
    return entry, parts


def _quantise(name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 in the weight's shape and the float32 scale of each output channel: off by half a scale at most."""
    wide = weight.double()
    largest = wide.abs().flatten(1).amax(1)
    scale = (largest / 127).float().clamp(min=2.0**-149)
    scale = scale.nextafter(torch.tensor(math.inf)).where(scale.double() * 127 < largest, scale)  # nothing is clipped
    if not scale.isfinite().all():
        raise PackedError(f"{name} holds NaN or infinity, which int8 cannot; mend the weights or leave int8 off")
    return (wide / scale.double().view(-1, *[1] * (wide.dim() - 1))).round().to(torch.int8), scale


def _kept(name: str, groups: Tensor, found: Pattern) -> Tensor:
    """Boolean ``[G, M]``, exactly N a group: all non-zeros, filled up by -0.0 first and then by the first zeros."""
    nonzero = groups.ne(0).to(torch.int8)
    over = int((pattern.total(nonzero) > found.n).sum())
    if over:
        raise PackedError(
            f"{name}: {over} of {len(groups)} groups hold more than {found.n} non-zero weights in {found.m}; "
            "bake the masks into the weights first, or give the layer's own pattern"
        )
    written = groups.view(INTEGERS[groups.itemsize]).ne(0).to(torch.int8)  # true of -0.0 too
    return pattern.keep(nonzero + written, found.n)


def _encode(kept: Tensor, found: Pattern) -> Tensor:
    """Bit planes ``[bits, ceil(G / 8)]`` of the ranks of the kept sets, boolean ``[G, M]``."""
    subsets = np.array(list(itertools.combinations(range(found.m), found.n)))
    ranks = np.zeros(2**found.m, np.uint16)
    ranks[(1 << subsets).sum(1)] = np.arange(len(subsets))
    codes = ranks[sum(column.astype(np.int32) << place for place, column in enumerate(kept.numpy().T))]
    bits = (len(subsets) - 1).bit_length()
    return torch.from_numpy(np.stack([np.packbits(codes >> bit & 1 != 0) for bit in range(bits)]))


def _entry(shape: list[int], dtype: str, stored: str, found: Pattern | None) -> dict[str, Any]:
    """What the manifest says of a tensor: it reads back as ``dtype``, its numbers in the file are ``stored``."""
    entry = {"kind": "nm" if found else "dense", "shape": shape, "dtype": dtype, "stored": stored}
    if not found:
        return entry
    groups, bits = math.prod(shape) // found.m, (math.comb(found.m, found.n) - 1).bit_length()
    return entry | {"pattern": str(found), "n": found.n, "m": found.m, "groups": groups, "bits": bits}


def _layout(name: str, entry: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """dtype and shape of each tensor that the file holds for this entry."""
    if entry["kind"] == "nm":
        parts = {f"{name}.values": (entry["stored"], [entry["groups"], entry["n"]])}
        parts[f"{name}.codes"] = ("uint8", [entry["bits"], -(-entry["groups"] // 8)])
    else:
        parts = {name: (entry["stored"], entry["shape"])}
    if entry["stored"] != entry["dtype"]:
        parts[f"{name}.scale"] = ("float32", [entry["shape"][0]])
    return parts


def _check_weight(name: str, entry: dict[str, Any], found: Pattern) -> None:
    shape, dtype = entry["shape"], entry["dtype"]
    floating = len(shape) >= 2 and getattr(torch, dtype).is_floating_point
    why = pattern.ineligible(tuple(shape), found.m) if floating else f"{dtype} {shape} is no floating [K, C, ...]"
    if not why and math.prod(shape[1:]) > LARGEST_ROW:
        why = f"more than {LARGEST_ROW} weights per output channel"
    if why:
        raise PackedError(f"{name} cannot be {found}: {why}; leave the layer dense")


def _checked(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry; PackedError, KeyError, TypeError or ValueError unless :func:`_pack` could have made it."""
    shape, dtype, stored = entry["shape"], entry["dtype"], entry["stored"]
    if not all(type(side) is int and side > 0 for side in shape) or len(shape) > 8:
        raise PackedError(f"{name} has the shape {shape}")
    if dtype not in DTYPES or (stored != dtype and (stored, dtype, len(shape) > 1) != ("int8", "float32", True)):
        raise PackedError(f"{name} is {dtype!r} stored as {stored!r}")
    found = parse_pattern(entry["pattern"]) if entry["kind"] == "nm" else None
    if found:
        _check_weight(name, entry, found)
    made = _entry(shape, dtype, stored, found)
    if entry != made:
        raise PackedError(f"the entry of {name} contradicts itself")
    return made  # not the one found: there 2.0 may stand for 2


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The mapped file; what safetensors or the disk says against it, and a PackedError, name the file."""
    from safetensors import SafetensorError, safe_open

    try:
        require_header(path)
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, PackedError, UntrustedError) as error:
        why = one_line(error, 300)  # names in a hostile file may hold line feeds
        raise PackedError(f"{path} is no sound packed file: {why}; export it again") from None


def manifest(path: Path) -> dict[str, Any]:
    """The manifest, without a look at the tensors' content and so at whether ``sha256`` is right.

    PackedError for a file that is not ours, of an unknown version, or that holds other tensors than its
    manifest says.
    """
    with _opened(path) as file:
        return _manifest(file)


def _manifest(file: Any) -> dict[str, Any]:
    try:
        found = json.loads((file.metadata() or {})["manifest"])
        if found["format"] != FORMAT or not isinstance(found["config"], dict) or "sha256" not in found:
            raise PackedError(f"no {FORMAT} manifest")
        if found["version"] != VERSION:
            raise PackedError(f"version {found['version']!r} is unknown, this is {VERSION}; update prunedm")
        found["tensors"] = {name: _checked(name, entry) for name, entry in found["tensors"].items()}
        _check_layout(file, found["tensors"])
        return found
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise error if isinstance(error, PackedError) else PackedError(f"no {FORMAT} manifest ({error!r})") from None


def _check_layout(file: Any, entries: dict[str, Any]) -> None:
    """The file holds exactly the tensors that the manifest speaks of: its size bounds all memory."""
    held, wanted = set(file.keys()), set()
    for name, entry in entries.items():
        for part, (dtype, shape) in _layout(name, entry).items():
            found = file.get_slice(part)  # SafetensorError where it is missing
            if (found.get_dtype(), list(found.get_shape())) != (DTYPES[dtype], shape):
                raise PackedError(f"it holds no {part} of {dtype} {shape}")
            wanted.add(part)
    if odd := sorted(held - wanted):
        raise PackedError(f"its manifest does not describe {odd[0]}")


def information_limit(manifest: dict[str, Any]) -> float:
    """Bytes that no coding of these values undercuts: N values and log2 C(M, N) bits a group, the rest as stored."""
    total = 0.0
    for entry in manifest["tensors"].values():
        parts = _layout("", entry)
        if parts.pop(".codes", None):
            total += entry["groups"] * math.log2(math.comb(entry["m"], entry["n"])) / 8
        total += sum(math.prod(shape) * getattr(torch, dtype).itemsize for dtype, shape in parts.values())
    return total


def read(path: Path, check: bool = True) -> dict[str, Tensor]:
    """The full dense state dict, contiguous copies on the CPU; what was int8 comes as float32.

    ``check`` compares the file's SHA-256, in a second thread beside the unpacking: every altered byte is
    found. Without it only what contradicts the manifest is found. PackedError, in one line, for either.
    """
    with _opened(path) as file, ThreadPoolExecutor(1) as pool:
        found = _manifest(file)
        digest = pool.submit(_digest, path) if check else None
        work = _Work()
        tensors = {name: _unpack(name, entry, file, work) for name, entry in found["tensors"].items()}
        if digest and digest.result() != found["sha256"]:
            raise PackedError("its SHA-256 is not the one it states, so some of it was altered")
    return tensors


def _seal(header: bytes | bytearray) -> int:
    """Where the 64 digits of the SHA-256 begin in a file's header."""
    places = [found.start(1) for found in SEAL.finditer(header, 8, 8 + int.from_bytes(header[:8], "little"))]
    if len(places) != 1:
        raise PackedError(f"its header states {len(places)} SHA-256 in place of one")
    return places[0]


def _digest(path: Path) -> str:
    """SHA-256 of a file with its own digits replaced by zeros."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        header = mapped[: 8 + int.from_bytes(mapped[:8], "little")]
        start = _seal(header)
        digest = hashlib.sha256(header[:start] + b"0" * 64 + header[start + 64 :])
        with memoryview(mapped) as view, view[len(header) :] as rest:
            digest.update(rest)  # in one piece: it frees the interpreter for the unpacking
    return digest.hexdigest()


class _Work:
    """What unpacking keeps from one tensor to the next: sparse matrices by shape, and memory.

    Memory comes in large blocks, for which numpy asks for huge pages: page faults of 4 KiB would cost as
    much as the unpacking itself. Each tensor has a storage of its own size in its block.
    """

    def __init__(self) -> None:
        self.matrices: dict[Any, Any] = {}
        self.block = np.empty(0, np.uint8)

    def empty(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > len(self.block):
            self.block = np.empty(max(size, BLOCK), np.uint8)
        part, self.block = self.block[:size], self.block[-(-size // 64) * 64 :]
        return torch.from_numpy(part).view(dtype).view(shape)

    def scatter(self, places: np.ndarray, kept: np.ndarray, dense: np.ndarray) -> None:
        """Fill ``dense [rows, all]`` with zeros, then with ``kept [rows, some]`` at ``places`` of each row.

        By a sparse matrix of integers, the fastest scatter at hand; to make one takes as long as to use it.
        """
        from scipy.sparse import csr_array

        key = (dense.shape, kept.shape, dense.dtype)
        matrix = self.matrices.get(key)
        if matrix is None:
            matrix = self.matrices[key] = csr_array(dense.shape, dtype=dense.dtype)
            matrix.indptr = np.arange(len(kept) + 1, dtype=np.int32) * np.int32(kept.shape[1])
        matrix.indices, matrix.data = places.reshape(-1), kept.reshape(-1)
        matrix.toarray(out=dense)


def _unpack(name: str, entry: dict[str, Any], file: Any, work: _Work) -> Tensor:
    """One tensor as the manifest describes it; PackedError where a code is no rank."""
    parts = {part[len(name) :]: file.get_tensor(part) for part in _layout(name, entry)}
    n, m, shape = entry.get("n"), entry.get("m"), entry["shape"]
    tensor, scale = work.empty(shape, getattr(torch, entry["dtype"])), parts.get(".scale")
    if m is None:
        tensor.copy_(parts[""])
        return tensor if scale is None else tensor.mul_(scale.view(-1, *[1] * (len(shape) - 1)))
    planes = parts[".codes"].numpy()
    if _exceeds(planes, math.comb(m, n) - 1):
        raise PackedError(f"{name} holds codes that are no rank of {n}:{m} (0 to {math.comb(m, n) - 1})")
    per, table, offsets = _tables(n, m, shape[1] // m, math.prod(shape[2:]))
    lookups = _lookups(planes, per)
    values, integer = parts[".values"].view(shape[0], -1), INTEGERS[tensor.itemsize]
    dense, width = tensor.view(shape[0], -1).view(integer).numpy(), values.shape[1]
    # Eight output channels begin on a whole byte of the planes, whatever the number of their groups.
    step = 8 * max(1, CHUNK // (8 * width))
    for first in range(0, shape[0], step):
        last = min(shape[0], first + step)
        part = lookups[first * width // n // per : -(-last * width // n // per)]
        places = table.take(part, axis=0, mode="clip").reshape(-1)[: (last - first) * width].reshape(-1, width)
        places += offsets
        kept = values[first:last] if scale is None else values[first:last] * scale[first:last, None]
        work.scatter(places, kept.view(integer).numpy(), dense[first:last])
    return tensor


def _exceeds(planes: np.ndarray, largest: int) -> bool:
    """Whether any code in the bit planes is greater: compared bit by bit from the highest, eight codes a byte."""
    equal, greater = np.full_like(planes[0], 255), np.zeros_like(planes[0])
    for bit, plane in reversed(list(enumerate(planes))):
        if largest >> bit & 1:
            equal &= plane
        else:
            greater |= equal & plane
    return bool(greater.any())


@lru_cache(maxsize=16)
def _tables(n: int, m: int, blocks: int, kernel: int) -> tuple[int, np.ndarray, np.ndarray]:
    """``per`` groups at once; int32 ``[2 ** (bits * per), per * N]``: where their kept values stand, counted from the
    beginning of each group, by the bits of their codes in the planes; and where in ``[C, R * S]`` each group of an
    output channel begins, int32, once for each of its N values."""
    subsets = np.array(list(itertools.combinations(range(m), n)), np.int32) * np.int32(kernel)
    bits = (len(subsets) - 1).bit_length()
    per = next(per for per in (4, 2, 1) if bits * per <= LOOKUP_BITS or per == 1)
    index = np.arange(2 ** (bits * per))
    codes = [sum((index >> (bit * per + per - 1 - k) & 1) << bit for bit in range(bits)) for k in range(per)]
    places = np.concatenate([subsets[np.minimum(code, len(subsets) - 1)] for code in codes], 1)
    first = np.arange(kernel, dtype=np.int32)[:, None] + np.arange(blocks, dtype=np.int32) * np.int32(m * kernel)
    return per, places, np.repeat(first.reshape(-1), n)


def _lookups(planes: np.ndarray, per: int) -> np.ndarray:
    """Bit planes ``[bits, B]`` to the table's index of each ``per`` groups, ``[B * 8 / per]``."""
    found = np.empty((planes.shape[1], 8 // per), np.intp)
    for column in range(8 // per):
        part = (planes >> (8 - per * (column + 1)) & (2**per - 1)).astype(np.uint16)
        for bit in range(1, len(part)):
            part[0] |= part[bit] << (bit * per)
        found[:, column] = part[0]
    return found.reshape(-1)
