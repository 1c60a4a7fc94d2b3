"""What huggingface_hub raises, as one message that says what is wrong and what to do.

Its classes overlap (a gated repository is a missing one, every HTTP error is an OSError, a bad
request a ValueError), so the order of the questions matters. No message holds a token.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from huggingface_hub import constants, errors, get_token, utils

from loratool.errors import InputError, LoratoolError, OutputError, UsageError
from loratool.refs import Ref

# httpx for huggingface_hub 1, httpx2 for 2: the one that it raises errors of.
httpx: Any = utils.httpx

# Errors that only say where another one happened.
_WRAPPERS = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, RuntimeError)
_TOKEN = re.compile(r"\b(hf|api)_[A-Za-z0-9_]{6,}")
_IN_ADDRESS = re.compile(r"/resolve/[^/]+/(?P<file>[^?]+)|/(revision|tree|refs|commits)/")
_UPLOADING = re.compile(r"Error while uploading '(.+)' to the Hub")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_AGAIN = "run the same command again: what has arrived is not sent twice"


@contextmanager
def explaining(ref: Ref, name: str = "", *, writing: bool = False) -> Iterator[None]:
    """Turn what huggingface_hub raises inside the block into a LoratoolError.

    Raises:
        InputError: as `explained`, when reading.
        OutputError: as `explained`, when `writing`.
    """
    try:
        yield
    except Exception as error:
        raise explained(error, ref, name, writing=writing) from error


def explained(
    error: Exception, ref: Ref, name: str = "", *, writing: bool = False
) -> LoratoolError:
    """What an error of huggingface_hub means for the user.

    Args:
        error: what was raised.
        ref: what was asked for.
        name: the file that it is about, if it is about one.
        writing: whether something was to be sent: OutputError instead of InputError.

    Raises:
        Exception: the error itself, if it says no more than that there is a bug.
    """
    if isinstance(error, LoratoolError):
        return error
    cause = _cause(error)
    uploading = _UPLOADING.match(str(error))
    name = name or (uploading[1] if uploading else "")
    if isinstance(cause, UsageError) or not isinstance(cause, _expected()):
        raise error
    where = f"{ref.text}: {name}" if name else ref.text
    text = hide_tokens(f"{where}: {_message(cause, ref, writing)}")
    return OutputError(text) if writing else InputError(text)


def _expected() -> tuple[type[BaseException], ...]:
    return (
        OSError,
        ValueError,
        httpx.HTTPError,
        httpx.InvalidURL,
        errors.EntryNotFoundError,
        errors.RevisionResolutionError,
        errors.OIDCError,
    )


def hide_tokens(text: str) -> str:
    """The text without anything that looks like, or is, an access token."""
    token = _token()
    if token:
        text = text.replace(token, "[token]")
    return _TOKEN.sub("[token]", text)


def page(ref: Ref) -> str:
    """Where a person sees the repository."""
    return f"{constants.ENDPOINT}/{ref.repo or ref.text}"


def is_status(error: BaseException, *statuses: int) -> bool:
    """Whether it is an HTTP error of one of these statuses."""
    return isinstance(error, errors.HfHubHTTPError) and error.response.status_code in statuses


def _token() -> str | None:
    try:
        return get_token()
    except Exception:  # its own error is told when it is needed
        return os.environ.get("HF_TOKEN")


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, _WRAPPERS) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _message(error: BaseException, ref: Ref, writing: bool) -> str:
    if isinstance(error, errors.HfHubHTTPError):
        return _of_answer(error, ref, writing)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return _offline(writing)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _offline(writing) if constants.HF_HUB_OFFLINE else "is not in the cache"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository holds no such file"
    if isinstance(error, errors.HFValidationError):
        return (
            "is not a valid name on the Hub: write org/name, with letters, digits, '-', '_' and "
            "'.' only, no '--' or '..', no '-' or '.' at either end, and 96 characters at most"
        )
    if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
        return _of_connection(error, writing)
    if isinstance(error, errors.OIDCError):
        return f"no token could be had from HF_OIDC_RESOURCE: {_line(error)}"
    if isinstance(error, UnicodeError):
        return "the access token holds characters that no token has: check HF_TOKEN"
    if isinstance(error, json.JSONDecodeError | errors.FileMetadataError):
        return (
            f"{constants.ENDPOINT} does not answer as the Hub does: check HF_ENDPOINT, and whether "
            "a proxy or a log-in page of the network is in between"
        )
    if isinstance(error, OSError):
        return _of_system(error)
    return _line(error)


def _of_answer(error: errors.HfHubHTTPError, ref: Ref, writing: bool) -> str:
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return _gated(ref)
    if isinstance(error, errors.DisabledRepoError):
        return f"the Hub has disabled this repository: see {page(ref)}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return _missing(ref, status, writing)
    if isinstance(error, errors.RevisionNotFoundError):
        name = f" {ref.revision}" if ref.revision else " of that name"
        return f"has no revision{name}: {page(ref)}/tree/main lists its branches and tags"
    if isinstance(error, errors.EntryNotFoundError):
        return f"holds no file {_file(error) or 'of that name'}: see {page(ref)}/tree/main"
    said = _line(error.server_message or "")
    quoted = f" ({said})" if said else ""
    if status in (401, 403) and not str(error.response.url).startswith(constants.ENDPOINT):
        return f"the Hub's storage refuses (status {status}): {_later(writing)}"
    if status == 401:
        return f"the Hub does not accept the access token: it is wrong or expired; {_LOG_IN}"
    if status == 402:
        return f"the Hub asks for a paid plan{quoted}: see {constants.ENDPOINT}/settings/billing"
    if status == 403 and writing:
        return (
            f"the access token may not write to {(ref.repo or ref.text).partition('/')[0]}"
            f"{quoted}: use one with write access ({constants.ENDPOINT}/settings/tokens), another "
            "name, or --pr to propose the change"
        )
    if status == 403:
        return f"the access token may not read it{quoted}; use another one: {_LOG_IN}"
    if status == 409:
        return f"something else is changing it at this moment{quoted}: try again"
    if status == 412:
        return (
            "somebody else has changed it in the meantime, so nothing was changed: look at "
            f"{page(ref)}/commits/{ref.revision or 'main'}, and push again"
        )
    if status == 413:
        return f"the Hub refuses a file because of its size{quoted}: use smaller shards"
    if status == 429:
        return f"the Hub allows no more requests for now: {_wait(error.response.headers)}"
    if status >= 500:
        return f"the Hub has a problem (status {status}{_also(said)}): {_later(writing)}"
    return f"the Hub refuses (status {status}){quoted or ': no reason is given'}"


def _gated(ref: Ref) -> str:
    if _token():
        return (
            "access is restricted, and the account of your token has not been let in: ask for it "
            f"at {page(ref)}"
        )
    return f"access is restricted: accept the conditions at {page(ref)}, then {_LOG_IN}"


def _missing(ref: Ref, status: int, writing: bool) -> str:
    if not _token():
        if writing:
            return f"writing needs an access token: {_LOG_IN} to one with write access"
        return (
            f"there is no such repository at {constants.ENDPOINT}, or it is private: check the "
            f"name; if it is private, {_LOG_IN}"
        )
    if status == 401:
        return f"the Hub does not accept the access token, or there is no such name; {_LOG_IN}"
    return (
        f"there is no such repository at {constants.ENDPOINT}, or your token may not see it: "
        "check the name, and with `hf auth whoami` who you are"
    )


def _of_connection(error: Exception, writing: bool) -> str:
    host = constants.ENDPOINT
    if isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol)):
        return f"{host} is no address of a Hub: check HF_ENDPOINT and the proxy's variables"
    if isinstance(error, httpx.LocalProtocolError):
        return "the access token cannot be sent as it is: check HF_TOKEN for strange characters"
    if isinstance(error, httpx.ProxyError):
        return f"the proxy does not let through to {host}: check HTTPS_PROXY and NO_PROXY"
    if isinstance(error, httpx.TimeoutException):
        return f"{host} did not answer in time: {_later(writing)}"
    if isinstance(error, httpx.ConnectError):
        return f"{host} cannot be reached ({_line(error)}): check the network, HF_ENDPOINT, proxies"
    return f"the connection to {host} was cut: {_later(writing)}"


def _of_system(error: OSError) -> str:
    said = str(error)
    if "Consistency check failed" in said:
        sizes = re.search(r"of size (\d+) but has size (\d+)", said)
        if sizes is None:
            return "a file did not arrive as it was announced: try again"
        return f"{sizes[2]} bytes arrived where {sizes[1]} were announced: try again"
    if error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return _line(said)


def _offline(writing: bool) -> str:
    if writing:
        return "HF_HUB_OFFLINE is set, so nothing can be sent: unset it"
    return "is not in the cache, and HF_HUB_OFFLINE is set: unset it to download"


def _later(writing: bool) -> str:
    return _AGAIN if writing else "try again; a download goes on where it stopped"


def _wait(headers: Mapping[str, str]) -> str:
    seconds = headers.get("Retry-After", "")
    if not seconds:
        found = re.search(r"\bt=(\d+)", headers.get("RateLimit", ""))
        seconds = found[1] if found else ""
    return f"try again in {seconds} seconds" if seconds.isdigit() else "try again in a few minutes"


def _also(said: str) -> str:
    return f": {said}" if said else ""


def _file(error: Any) -> str | None:
    found = _IN_ADDRESS.search(str(error.response.request.url))
    return unquote(found["file"]) if found and found["file"] else None


def _line(said: object) -> str:
    """A stranger's message on one line, without its addresses: those may be signed."""
    text = " ".join(str(said).split())
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", text)[:300]
