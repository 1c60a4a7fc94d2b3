"""Publishing on the Hugging Face Hub: one commit with everything, or none."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    get_token,
)
from huggingface_hub.hf_api import RepoFile

from loratool.card import is_unchanged
from loratool.disclosure import require_no_secrets
from loratool.errors import OutputError, UsageError
from loratool.files import file_content
from loratool.front_matter import completed, parse_card
from loratool.publication import Publication, Published, Publishing
from loratool.refs import Ref
from loratool.reports import listed
from loratool_plugins.stores._hub_contents import Changes, compare, kinds, unknown
from loratool_plugins.stores._hub_errors import explaining, httpx, is_status, page
from loratool_plugins.stores._hub_quiet import quietly

_MAIN = "main"
# Bytes of files whose addresses are asked for at a time: the Hub's addresses expire.
_BATCH = 10 * 1024**3
_CALLED = {"adapter": "an adapter", "model": "a model", "onnx": "an ONNX model"}
_SMALL = 1 << 26
_CARD = "README.md"


@dataclass(frozen=True)
class _Place:
    """A branch as it is now.

    Attributes:
        ref: what the user named.
        repo: the repository's name.
        branch: the branch.
        head: the commit that the change is made to; "" if the repository does not exist.
        is_new: whether the repository has to be created, or just was.
        is_new_branch: whether the branch has to be created, at `head`.
        files: what is there.
        tags: tag -> commit.
    """

    ref: Ref
    repo: str
    branch: str
    head: str
    is_new: bool
    is_new_branch: bool
    files: dict[str, RepoFile]
    tags: dict[str, str]


def publish(publication: Publication, ref: Ref, how: Publishing) -> Published:
    """Bring a repository to hold a publication, by one commit.

    What is there already is neither sent nor committed again. The files go up first and are seen
    by nobody; the commit makes all of them visible at once, if nobody else has committed meanwhile.

    Raises:
        OutputError: it cannot be written, holds something else, was changed in between, has the tag
            elsewhere, or is public where it should be private.
        InputError: a file holds the access token.
        UsageError: options that contradict each other or the reference.
    """
    repo, branch = _named(ref, how)
    with explaining(ref, writing=True):
        _require_no_token(publication)
    with quietly(bars=sys.stderr.isatty()):
        return _publish(publication, ref, repo, branch, how)


def _publish(
    publication: Publication, ref: Ref, repo: str, branch: str, how: Publishing
) -> Published:
    api = HfApi(library_name="loratool")
    with explaining(ref, writing=True):
        place = _look(api, ref, repo, branch, how)
    if not how.force:
        _require_same_kind(publication, place)
        with explaining(ref, writing=True):
            publication = _with_their_card(api, publication, place)
    changes = compare(publication, place.files, how.force)
    moves_tag = _check_tag(place, changes, how)
    if how.dry_run:
        return _published(place, changes, publication.notes)
    with explaining(ref, writing=True):
        if not place.head:
            place = _create(api, place, how)
        done = _published(place, changes, publication.notes)
        if changes:
            done = _commit(api, publication, place, changes, how, done)
        elif place.is_new_branch:
            api.create_branch(place.repo, branch=place.branch, revision=place.head)
        if how.tag:
            _tag(api, place, how.tag, done.commit or place.head, moves_tag)
    return done


def _named(ref: Ref, how: Publishing) -> tuple[str, str]:
    if ref.repo is None:
        raise UsageError(f"{ref.text}: is no name on the Hub; write org/name")
    if ref.subfolder:
        raise UsageError(
            f"{ref.text}: a repository is published as a whole; leave :{ref.subfolder} out"
        )
    if ref.revision and how.revision and ref.revision != how.revision:
        raise UsageError(f"{ref.text}: names another branch than --revision {how.revision}")
    if how.pull_request and how.tag:
        raise UsageError("--tag with --pr: a proposal gets its tag when it is merged")
    return ref.repo, how.revision or ref.revision or _MAIN


def _require_no_token(publication: Publication) -> None:
    """The environment's tokens were looked for before; this one may come from a file."""
    token = get_token()
    for name, content in publication.files.items():
        if token and (isinstance(content, bytes) or content.stat().st_size < _SMALL):
            require_no_secrets(name, file_content(content), [token])


def _look(api: HfApi, ref: Ref, repo: str, branch: str, how: Publishing) -> _Place:
    """The state of the repository, as it is seen by whoever pushes."""
    try:
        info = api.model_info(repo)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        if how.pull_request:
            raise
        if not how.dry_run and get_token() is None:
            raise
        return _Place(ref, repo, branch, "", True, branch != _MAIN, {}, {})
    if how.private is not None and bool(info.private) != how.private:
        is_, asked = ("private", "--public") if info.private else ("public", "--private")
        raise OutputError(
            f"{ref.text}: is {is_}, and {asked} is only for new repositories: nothing was sent; "
            f"change it at {page(ref)}/settings, or leave {asked} out"
        )
    refs = api.list_repo_refs(repo)
    tags = {tag.name: tag.target_commit for tag in refs.tags}
    heads = {found.name: found.target_commit for found in refs.branches}
    if branch in tags and branch not in heads:
        raise OutputError(f"{ref.text}: {branch} is a tag, which cannot be changed; name a branch")
    if branch.startswith("refs/pr/"):
        heads[branch] = str(api.model_info(repo, revision=branch).sha)
    is_new = branch not in heads
    if is_new and how.pull_request:
        raise OutputError(f"{ref.text}: has no branch {branch} to propose the change for")
    head = heads.get(branch) or heads.get(_MAIN) or str(info.sha)
    tree = api.list_repo_tree(repo, recursive=True, revision=head)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return _Place(ref, repo, branch, head, False, is_new, files, tags)


def _require_same_kind(publication: Publication, place: _Place) -> None:
    held = kinds(place.files)
    foreign = unknown(name for name in place.files if name not in publication.files)
    if publication.kind in held or not (held or foreign):
        return
    others = f"other weights or data ({listed(foreign, 2)})"
    what = " and ".join(_CALLED[kind] for kind in sorted(held)) or others
    raise OutputError(
        f"{place.ref.text}: holds {what}, not {_CALLED[publication.kind]}: choose another name, or "
        "replace it with --force"
    )


def _with_their_card(api: HfApi, publication: Publication, place: _Place) -> Publication:
    """The publication with the card that somebody has written there, if ours was written by nobody.

    It gets the metadata that it lacks, and our text if it has none.
    """
    ours = publication.files.get(_CARD)
    if not isinstance(ours, bytes) or not is_unchanged(ours.decode()) or _CARD not in place.files:
        return publication
    label = f"{_CARD} of {place.repo}"
    path = api.hf_hub_download(place.repo, _CARD, revision=place.head)
    text = Path(path).read_bytes().decode("utf-8", "replace")
    if is_unchanged(text):
        return publication
    theirs, generated = parse_card(text, label), parse_card(ours.decode(), label)
    if theirs.start and not theirs.end.strip("- \t\r\n"):
        theirs = replace(theirs, end=generated.end)
    kept = completed(theirs, generated.metadata, label).encode()
    note = f"{label}: kept, since somebody has written it; --force replaces it"
    files = {**publication.files, _CARD: kept}
    return replace(publication, files=files, notes=(*publication.notes, note))


def _check_tag(place: _Place, changes: Changes, how: Publishing) -> bool:
    """Whether an existing tag has to move; OutputError if it may not."""
    if not how.tag or how.tag not in place.tags:
        return False
    if not changes and place.tags[how.tag] == place.head:
        return False
    if not how.force:
        raise OutputError(
            f"{place.ref.text}: the tag {how.tag} is at another commit, "
            f"{place.tags[how.tag][:8]}: choose another one, or move it with --force"
        )
    return True


def _create(api: HfApi, place: _Place, how: Publishing) -> _Place:
    """Make the repository; the Hub's first commit is what the change is made to."""
    api.create_repo(place.repo, private=how.private, exist_ok=True)
    info = api.model_info(place.repo)
    if how.private and not info.private:
        raise OutputError(f"{place.ref.text}: somebody has just created it as a public one")
    return replace(place, head=str(info.sha))


def _published(place: _Place, changes: Changes, notes: tuple[str, ...]) -> Published:
    branch = "" if place.branch == _MAIN else f"/tree/{place.branch}"
    return Published(
        f"{constants.ENDPOINT}/{place.repo}{branch}",
        sent=changes.sent,
        removed=changes.removed,
        unchanged=changes.unchanged,
        created=place.is_new,
        notes=notes,
        new=changes.new,
    )


def _commit(
    api: HfApi,
    publication: Publication,
    place: _Place,
    changes: Changes,
    how: Publishing,
    done: Published,
) -> Published:
    additions = [CommitOperationAdd(name, publication.files[name]) for name in changes.sent]
    # A new branch is made only for the commit: before, its parent stands for it.
    parent = _MAIN if place.is_new_branch else place.branch
    for batch in _batches(additions):
        api.preupload_lfs_files(
            place.repo, batch, revision=parent, create_pr=how.pull_request, free_memory=False
        )
    _require_all_wanted(place, additions)
    if place.is_new_branch:
        api.create_branch(place.repo, branch=place.branch, revision=place.head)
    removals = [CommitOperationDelete(name, is_folder=False) for name in changes.removed]
    notes: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            info: CommitInfo = api.create_commit(
                place.repo,
                [*additions, *removals],
                commit_message=how.message or f"Upload {_CALLED[publication.kind]} with loratool",
                revision=place.branch,
                parent_commit=place.head,
                create_pr=how.pull_request,
            )
        notes += [str(warning.message) for warning in caught]
    except Exception as error:
        is_lost = isinstance(error, httpx.TransportError) and not how.pull_request
        landed = _landed(api, publication, place, how) if is_lost else ""
        if not landed:
            _withdraw_branch(api, place)
            raise
        note = "the Hub's answer was lost, but the commit is there"
        return replace(done, commit=landed, notes=(*done.notes, note))
    url = info.pr_url if how.pull_request and info.pr_url else done.url
    return replace(done, url=url, commit=info.oid, notes=(*done.notes, *notes))


def _batches(additions: Iterable[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    batch: list[CommitOperationAdd] = []
    size = 0
    for addition in additions:
        if batch and size + addition.upload_info.size > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(addition)
        size += addition.upload_info.size
    if batch:
        yield batch


def _require_all_wanted(place: _Place, additions: Iterable[CommitOperationAdd]) -> None:
    """A .gitignore in the repository would make the Hub leave files out without a word."""
    ignored = [a.path_in_repo for a in additions if getattr(a, "_should_ignore", False)]
    if ignored:
        raise OutputError(
            f"{place.ref.text}: its .gitignore keeps {listed(ignored, 4)} out: change that first"
        )


def _landed(api: HfApi, publication: Publication, place: _Place, how: Publishing) -> str:
    """The commit, if it was made although its answer was lost."""
    info = api.model_info(place.repo, revision=place.branch)
    tree = api.list_repo_tree(place.repo, recursive=True, revision=str(info.sha))
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return "" if compare(publication, files, how.force) else str(info.sha)


def _withdraw_branch(api: HfApi, place: _Place) -> None:
    """Delete the branch that was made for a commit that failed, if nobody else has used it."""
    if place.is_new_branch:
        with suppress(OSError, httpx.HTTPError):
            if api.model_info(place.repo, revision=place.branch).sha == place.head:
                api.delete_branch(place.repo, branch=place.branch)


def _tag(api: HfApi, place: _Place, tag: str, commit: str, moves: bool) -> None:
    if place.tags.get(tag) == commit:
        return
    try:
        if moves:
            api.delete_tag(place.repo, tag=tag)
        api.create_tag(place.repo, tag=tag, revision=commit)
    except errors.HfHubHTTPError as error:
        why = "somebody has just made it" if is_status(error, 409) else "the Hub refuses it"
        raise OutputError(
            f"{place.ref.text}: the files are there (commit {commit[:8]}), but not the tag {tag}: "
            f"{why}; run the same command again"
        ) from error
