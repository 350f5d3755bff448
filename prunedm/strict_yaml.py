"""YAML as people mean it: safe, ``1e-4`` is a number, ``1:4`` is text, and no key stands twice."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

DEEPEST = 40
LONGEST = 256 * 1024  # characters; keys chosen to collide make a table's time grow with the square of their number
# ValueError: dates that are none, such as 2024-13-45, and integers of more digits than Python reads.
FAULTS = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader of PyYAML, with the numbers of YAML 1.2 and with keys that stand once."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Nothing is merged: a merge key is refused as a tag without a meaning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
            twice = {str(key) for key, count in keys.items() if count > 1}
            raise yaml.YAMLError(f"{', '.join(sorted(twice))} stands twice; keep one")
        return found


NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0o?[0-7_]+|0|[1-9][\d_]*)",
    "tag:yaml.org,2002:float": r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.[\d_]+([eE][-+]?\d+)?"
    r"|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in NUMBERS]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _tag, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_form})$"), list("-+0123456789."))


def load(text: str) -> Any:
    """The document's value. One of :data:`FAULTS` when it is not YAML, a key stands twice, it has aliases or tags."""
    _require_plain(text)
    return yaml.load(text, _Loader)


def _require_plain(text: str) -> None:
    """No tag, no alias (by which a short text stands for one without end), no length or depth beyond reason."""
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"it has {len(text):,} characters and {LONGEST:,} are allowed")
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"*{event.anchor[:40]} is an alias, which is not read; write the value out")
        if getattr(event, "tag", None) is not None:  # only written ones: what is plain has none yet
            raise yaml.YAMLError(f"{event.tag[:60]} is a tag, which is not read; write the value alone")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} deep")


def dump(document: Any) -> str:
    """YAML that :func:`load` reads back, keys in their order."""
    return yaml.safe_dump(document, sort_keys=False)
