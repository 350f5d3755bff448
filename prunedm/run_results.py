"""The results in a run folder: figures, layer reports and the allocation, checked as they are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import StoreError, read_json, write_json
from .records import VARIANTS, LayerReport


class Results:
    """A part of store.Run. StoreError, with the remedy, where a file is damaged."""

    folder: Path

    def evaluation(self) -> dict[str, dict[str, Any]]:
        """Variant name to its figures; empty before the first one."""
        path = self.folder / "evaluation.json"
        found = read_json(path) if path.exists() else {}
        needed = {"parameters", "nonzero_parameters", "macs", "bytes"}
        if not isinstance(found, dict) or not set(found) <= set(VARIANTS) or not _all_have(found.values(), needed):
            raise StoreError(f"{path} is damaged; delete it and resume the run to evaluate again")
        return found

    def write_evaluation(self, value: dict[str, dict[str, Any]]) -> None:
        write_json(self.folder / "evaluation.json", value)

    def layers(self, variant: str = "nm") -> list[dict[str, Any]]:
        """The layer report of stage 2, or of another variant from its evaluation; empty before it."""
        path = self._layers_path(variant)
        found = read_json(path) if path.exists() else []
        if not isinstance(found, list) or not _all_have(
            found, {f.name for f in dataclasses.fields(LayerReport) if f.default is dataclasses.MISSING}
        ):
            raise StoreError(f"{path} is damaged; restore it or run the recipe again")
        return found

    def write_layers(self, value: list[dict[str, Any]], variant: str = "nm") -> None:
        write_json(self._layers_path(variant), value)

    def _layers_path(self, variant: str) -> Path:
        return self.folder / ("layers.json" if variant == "nm" else f"layers-{variant}.json")

    def allocation(self) -> dict[str, Any]:
        """The budgeted allocation of patterns (allocate.py); empty when the recipe asks for none."""
        path = self.folder / "allocation.json"
        found = read_json(path) if path.exists() else {}
        if not isinstance(found, dict) or (found and not _all_have(found.get("layers", [None]), {"layer", "chosen"})):
            raise StoreError(f"{path} is damaged; delete it and resume the run")
        return found

    def write_allocation(self, value: dict[str, Any]) -> None:
        write_json(self.folder / "allocation.json", value)


def _all_have(records: Iterable[Any], names: set[str]) -> bool:
    return all(isinstance(record, dict) and names <= set(record) for record in records)
