"""The base that adapters name in their own files."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.adapter import Adapter
from loratool.errors import InputError, MismatchError
from loratool.refs import Ref, parse_remote


def base_of(adapters: Sequence[Adapter]) -> Ref:
    """The one base that all adapters name: always a name on the Hub.

    What a stranger's file says is never taken for a path of this machine.

    Raises:
        InputError: an adapter names none, or one that is no name on the Hub.
        MismatchError: two name different ones.
    """
    found: dict[Ref, Adapter] = {}
    for adapter in adapters:
        name = adapter.base_name
        ref = parse_remote(name)
        if ref.repo is None or ref.subfolder is not None:
            said = f"the base {name!r}, which is no name on the Hub" if name else "no base"
            raise InputError(f"{adapter.label}: names {said}: give the base yourself")
        if adapter.base_revision and ref.revision is None:
            ref = parse_remote(f"{name}@{adapter.base_revision}")
        found.setdefault(ref, adapter)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise MismatchError(
            f"{first.label} names the base {one.text}, {second.label} {other.text}: give the base "
            "yourself"
        )
    return next(iter(found))
