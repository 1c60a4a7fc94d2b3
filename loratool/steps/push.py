"""push: an adapter, a model or an ONNX model to where others find it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loratool.errors import InputError, UsageError
from loratool.plugins import Operand, Store, option
from loratool.publication import Publication, Published, Publishing
from loratool.refs import Ref, parse_remote, shown
from loratool.reports import Report, Table, counted, format_bytes, listed

_KINDS = {"adapter": "an adapter", "model": "a model", "onnx": "an ONNX model"}
_NAMED = 6


@dataclass(frozen=True)
class Push:
    """Publish an adapter, a merged model or an ONNX folder, with a model card.

    It is checked first. Only what belongs to it is sent: no other files, no paths of this machine,
    no access token. A card that you wrote stays, and gets the metadata that it lacks. Everything
    becomes visible in one commit; what is there already is not sent, and what it supersedes goes.
    """

    operands: ClassVar[tuple[Operand, ...]] = (
        Operand("folder", "text"),
        Operand("target", "text"),
        Operand(
            "base",
            "text",
            required=False,
            flag=True,
            help="the base: the adapter is checked against it, and inherits its license",
        ),
    )
    output: ClassVar[str] = ""
    has_tasks: ClassVar[bool] = False

    private: bool = option(False, "make a new repository private")
    public: bool = option(False, "make a new repository public, whatever the account's default")
    revision: str = option("", "the branch, created where it is missing", metavar="BRANCH")
    tag: str = option("", "put this tag on the commit")
    message: str = option("", "the commit's message", metavar="TEXT")
    pr: bool = option(False, "propose the change as a pull request")
    dry_run: bool = option(False, "show what would be sent, and send nothing")
    license: str = option("", "the license's identifier on the Hub, for the card", metavar="ID")
    base_name: str = option("", "the base's Hub id, for adapter_config.json and the card")
    force: bool = option(
        False, "replace what is of another kind, a card that others wrote, a tag elsewhere"
    )

    def __post_init__(self) -> None:
        if self.private and self.public:
            raise UsageError("--private and --public contradict each other: give one")

    def run(self, folder: str, target: str, base: str | None = None) -> Report:
        """Check, describe and publish it.

        Raises:
            InputError: there is nothing that can be published, or a file holds an access token or
                a path of this machine that cannot be taken out.
            MismatchError: the adapter is faulty, or does not fit the base.
            OutputError: the place cannot be written, or holds something else; nothing was changed.
            UsageError: the target is no place to publish to, or an option means nothing there.
        """
        from loratool.card_choice import Wishes
        from loratool.opening import open_checkpoint
        from loratool.publishing import prepare

        ref = parse_remote(target)
        store = _store(ref)
        how = self._how()
        name = ref.repo or shown(target).rstrip("/").rpartition("/")[2]
        Wishes(name, None, self.base_name, self.license)  # a wrong one is told before any work
        opened = None if base is None else open_checkpoint(base)
        wishes = Wishes(name, opened, self.base_name, self.license)
        publication = prepare(Path(folder), wishes, _license_of)
        done = store.publish(publication, ref, how)
        return _report(folder, publication, done, how)

    def _how(self) -> Publishing:
        return Publishing(
            self.message,
            True if self.private else False if self.public else None,
            self.revision,
            self.tag,
            self.pr,
            self.dry_run,
            self.force,
        )


def _store(ref: Ref) -> Store:
    from loratool.opening import store_of

    if ref.repo is None and ref.url is None:
        raise InputError(
            f"{ref.text}: is no place to publish to: give org/name, or a URL such as s3://bucket/x"
        )
    store: Store = store_of(ref)
    return store


def _license_of(base: str) -> Mapping[str, str]:
    """The license of a base on the Hub; {} where it cannot be had."""
    from loratool.card_choice import license_in_folder
    from loratool.opening import locate

    try:
        return license_in_folder(locate(parse_remote(base)).path)
    except InputError:
        return {}


def _report(folder: str, publication: Publication, done: Published, how: Publishing) -> Report:
    size = sum(done.sent.values())
    data: dict[str, Any] = {
        "kind": "push",
        "of": publication.kind,
        "dry_run": how.dry_run,
        "url": done.url,
        "commit": done.commit or None,
        "created": done.created,
        "sent": dict(done.sent),
        "new": sorted(done.new),
        "removed": list(done.removed),
        "unchanged": done.unchanged,
        "bytes": size,
        "tag": how.tag or None,
    }
    notes = tuple(dict.fromkeys((*publication.notes, *done.notes)))
    lines = tuple(_lines(publication, done, how, size))
    table = _table(publication, done) if how.dry_run else None
    return Report(_title(folder, done, how), data, lines, table, notes)


def _title(folder: str, done: Published, how: Publishing) -> str:
    if how.dry_run:
        return f"Would push {folder} to {done.url}"
    if not (done.sent or done.removed):
        return f"Nothing has changed at {done.url}"
    if how.pull_request:
        return f"Proposed {folder} at {done.url}"
    return f"Pushed {folder} to {done.url}"


def _lines(publication: Publication, done: Published, how: Publishing, size: int) -> list[str]:
    lines = []
    if done.commit:
        lines.append(f"commit: {done.commit}")
    if done.created:
        lines.append("newly created" + (", private" if how.private else ""))
    what = _KINDS[publication.kind]
    sent = "to send" if how.dry_run else "sent"
    lines.append(f"{what}: {counted(len(done.sent), 'file')} {sent}, {format_bytes(size)}")
    if done.unchanged:
        lines.append(f"{counted(done.unchanged, 'file')} unchanged")
    if done.removed:
        lines.append(f"removed: {listed(done.removed, _NAMED)}")
    if how.tag:
        lines.append(f"tag: {how.tag}")
    return lines


def _table(publication: Publication, done: Published) -> Table:
    """Every file, and what happens to it."""
    rows = []
    for name, content in publication.files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        what = "new" if name in done.new else "changed" if name in done.sent else "unchanged"
        rows.append((name, format_bytes(size), what))
    rows += [(name, "", "removed") for name in done.removed]
    return Table(("file", "size", ""), tuple(rows))
