"""The model card of an adapter."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

from loratool.adapter import Adapter
from loratool.outcome import Outcome, counted_kinds
from loratool.refs import parse_ref
from loratool.reports import format_share
from loratool.updates import KIND_NAMES, LORA

_SIGNATURE = re.compile(r"<!-- loratool wrote this card: ([0-9a-f]{16}) -->\n\Z")


def signed(card: str) -> str:
    """A card that says, where nobody sees it, that nobody has changed it."""
    return f"{card}<!-- loratool wrote this card: {_digest(card)} -->\n"


def is_unchanged(card: str) -> bool:
    """Whether a card is as loratool wrote it, so that another may take its place."""
    found = _SIGNATURE.search(card)
    return found is not None and found[1] == _digest(card[: found.start()])


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]


def is_hub_name(name: str) -> bool:
    """Whether a base's name can be published: a Hub id, not a path of this machine."""
    ref = parse_ref(name)
    return ref.path is None and ref.repo is not None


def model_card(adapter: Adapter, outcome: Outcome, library: str = "peft", usage: str = "") -> str:
    """README.md for an adapter: Hub metadata, what it is, how good it is, how to load it.

    Nothing in it depends on where files lie on this machine.

    Args:
        adapter: what was written.
        outcome: what became of it.
        library: the Hub's name of the library that loads it.
        usage: Markdown that says how; PEFT's way if empty.
    """
    base = adapter.base_name if is_hub_name(adapter.base_name) else ""
    is_lora = any(kind in LORA for kind in outcome.kinds)
    header = ["---", f"library_name: {library}", "tags:", *["- lora"] * is_lora, "- loratool"]
    if base:
        header += [f"base_model: {base}", "base_model_relation: adapter"]
    header.append("---")
    lines = [
        *header,
        "",
        "# LoRA adapter" if is_lora else "# Adapter",
        "",
        adapter.provenance.sentence,
        "",
        *_contents(outcome),
        "",
        *_by_module(outcome),
        *(usage.splitlines() if usage else _usage(adapter, base)),
        "",
    ]
    return signed("\n".join(lines))


def _contents(outcome: Outcome) -> list[str]:
    """What it is made of, a line for each kind."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for name, certificate in outcome.low_rank.items():
        ranks[outcome.adapter[name].kind].append(certificate.rank)
    lines = [
        f"- {words}{of_rank(ranks[kind])}"
        for kind in KIND_NAMES
        for words in counted_kinds([kind] * outcome.kinds[kind])
    ]
    if outcome.sparse:
        number = sum(found.number for found in outcome.sparse.values())
        words = (
            f"- {number:,} single entries in sparse.safetensors, which only loratool uses "
            "(`loratool merge`): PEFT loads the factors alone"
        )
        if (alone := outcome.energy_of_factors) is not None:
            words += f", which capture {format_share(alone)}"
        lines.append(words)
    if outcome.low_rank:
        share = format_share(outcome.energy)
        lines.append(f"- {share} of the squared norm of the low-rank deltas captured")
    return lines


def of_rank(ranks: Sequence[int]) -> str:
    """The ranks of some updates in words: " of rank 4", " of ranks 4 to 8"; "" of none."""
    if not ranks:
        return ""
    low, high = min(ranks), max(ranks)
    return f" of rank {low}" if low == high else f" of ranks {low} to {high}"


def _usage(adapter: Adapter, base: str) -> list[str]:
    return [
        "```python",
        "from peft import PeftModel",
        *_loading(adapter, base),
        'model = PeftModel.from_pretrained(base, "ADAPTER")',
        "```",
    ]


def _loading(adapter: Adapter, base: str) -> list[str]:
    """Python lines that load the base, as the class that the adapter is for where that is known."""
    if adapter.model_config is None:
        lines = ["from transformers import AutoModel  # or the class that the adapter is for", ""]
        return [*lines, f'base = AutoModel.from_pretrained("{base or "BASE"}")']
    architecture = (adapter.model_config.get("architectures") or ["AutoModel"])[0]
    return [
        f"from transformers import AutoConfig, {architecture}",
        "",
        'config = AutoConfig.from_pretrained("ADAPTER/model")',
        f'base = {architecture}.from_pretrained("{base or "BASE"}", config=config)',
    ]


def module_kind(name: str) -> str:
    """What the modules of all layers have in common: "self_attn.q_proj"."""
    return ".".join(part for part in name.split(".")[-4:-1] if not part.isdigit())


def _by_module(outcome: Outcome) -> list[str]:
    energies = defaultdict(list)
    for name, certificate in outcome.low_rank.items():
        energies[module_kind(name)].append(certificate.energy)
    if not energies:
        return []
    return [
        "| module | updates | energy, lowest | energy, mean |",
        "|---|---|---|---|",
        *(
            f"| {module} | {len(shares)} | {format_share(min(shares))} "
            f"| {format_share(sum(shares) / len(shares))} |"
            for module, shares in energies.items()
        ),
        "",
    ]
