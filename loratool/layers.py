"""Where in a model a tensor lies, told from its name: in which layer, and as which matrix of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Matrices in the order in which data passes them; (pattern of the last parts of a name, place).
_ORDER = tuple(
    re.compile(pattern)
    for pattern in (
        r"(qkv|query_key_value|c_attn|qkv_proj|in_proj|to_qkv|Wqkv)",
        r"(q|query|q_proj|to_q|q_lin|wq|q_a_proj|q_b_proj)",
        r"(k|key|k_proj|to_k|k_lin|wk)",
        r"(v|value|v_proj|to_v|v_lin|wv)",
        r"(o|o_proj|out_proj|to_out|out_lin|wo)",
        r"(gate_proj|gate_up_proj|gate|wi_0|w1)",
        r"(up_proj|fc1|c_fc|lin1|wi|wi_1|intermediate|w3|dense_h_to_4h)",
        r"(down_proj|fc2|lin2|w2|dense_4h_to_h)",
    )
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        row: its name with `*` for the numbers of layers: tensors that differ in these alone share
            it.
        label: a short name of the row, which no other row has.
        layer: the number of its layer; None if it lies in none.
    """

    row: str
    label: str
    layer: int | None


def places(names: Iterable[str]) -> dict[str, Place]:
    """Where each of a model's tensors lies; rows in the order in which data passes them.

    A name's numbers that are the same in the whole row belong to its matrix, not to the layer
    (`layer.1.SelfAttention` of T5). Where several numbers vary, as in a U-Net's blocks, the layers
    are counted through.

    Args:
        names: of tensors, with or without ".weight".

    Returns:
        Name -> place, sorted by rows.
    """
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        row = ".".join("*" if part.isdecimal() else part for part in parts)
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        rows.setdefault(row, {})[name] = numbers
    layers = {row: _layers(found) for row, found in rows.items()}
    labels = _labels(layers)
    order = sorted(rows, key=lambda row: (_is_alone(layers[row]), _rank(row)))
    return {
        name: Place(row, labels[row], layer) for row in order for name, layer in layers[row].items()
    }


def _is_alone(layers: Mapping[str, int | None]) -> bool:
    return None in layers.values()


def _layers(numbers: Mapping[str, tuple[int, ...]]) -> dict[str, int | None]:
    """Name -> number of the layer, of the names of one row."""
    first = next(iter(numbers.values()))
    if not first:
        return dict.fromkeys(numbers)
    varying = [i for i in range(len(first)) if len({found[i] for found in numbers.values()}) > 1]
    if len(varying) <= 1:
        place = varying[0] if varying else 0
        return {name: found[place] for name, found in numbers.items()}
    counted = {found: count for count, found in enumerate(sorted(set(numbers.values())))}
    return {name: counted[found] for name, found in numbers.items()}


def _rank(row: str) -> tuple[int, int]:
    """Attention first, then by the order of matrices; unknown ones last, as they come."""
    parts = row.split(".")
    found = next(
        (
            place
            for place, pattern in enumerate(_ORDER)
            if any(pattern.fullmatch(part) for part in parts[-2:])
        ),
        len(_ORDER),
    )
    return (0 if _ATTENTION.search(row) or found < 5 else 1), found


def _labels(rows: Iterable[str]) -> dict[str, str]:
    """The shortest ends of the rows that are all different."""
    ends = dict.fromkeys(rows, 1)
    parts = {row: row.split(".") for row in ends}

    def label(row: str) -> str:
        return ".".join(parts[row][-ends[row] :])

    while True:
        found: dict[str, list[str]] = {}
        for row in ends:
            found.setdefault(label(row), []).append(row)
        short = [
            row
            for rows in found.values()
            if len(rows) > 1
            for row in rows
            if ends[row] < len(parts[row])
        ]
        if not short:
            return _shortened({row: label(row) for row in ends})
        for row in short:
            ends[row] += 1


def _shortened(labels: Mapping[str, str]) -> dict[str, str]:
    """Labels that reach back over numbers made shorter, where they stay different.

    "*.output.dense" becomes "output.dense", and "encoder.block.*.layer.*.SelfAttention.q" becomes
    "encoder: SelfAttention.q".
    """
    taken = set(labels.values())
    found = {}
    for row, label in labels.items():
        head, _, end = label.rpartition("*.")
        short = f"{row.partition('.')[0]}: {end}" if head.strip("*.") else end
        found[row] = label if short in taken else short
        taken.add(found[row])
    return found
