"""What the errors of many storage libraries mean, in one message that says what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from loratool.errors import InputError, LoratoolError, OutputError
from loratool_plugins.stores._fsspec_place import Place, protocols, shown

# Where the libraries themselves look for credentials.
_S3 = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a public bucket needs "
    "FSSPEC_S3_ANON=true"
)
_AZURE = "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and a key"
_GOOGLE = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
_WEB = "give USER:PASSWORD@ before the host, or put them into ~/.netrc"
_CREDENTIALS = {
    "s3": _S3, "s3a": _S3, "gs": _GOOGLE, "gcs": _GOOGLE, "az": _AZURE, "abfs": _AZURE,
    "abfss": _AZURE, "http": _WEB, "https": _WEB,
}  # fmt: skip
_UNREACHABLE = ("Connect", "Timeout", "TimedOut", "Disconnected", "DNS", "Payload", "Incomplete")
_BUSY = {errno.EBUSY, getattr(errno, "EREMOTEIO", errno.EIO)}
_BUGS = (TypeError, AttributeError, NameError, AssertionError, IndexError)


class ReadError(InputError):
    """A place cannot be read.

    Attributes:
        missing: whether there is nothing.
        again: whether another try could succeed.
    """

    def __init__(self, message: str, missing: bool = False, again: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        self.again = again


@contextmanager
def opening(url: str) -> Iterator[None]:
    """Raise InputError for what can go wrong before anything is asked of a store."""
    try:
        yield
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        package = (cause.name or "").partition(".")[0]
        what = f"`pip install {package}`" if package else str(error)
        raise InputError(
            f"{shown(url)}: a package that {'::'.join(protocols(url))}:// needs is not installed: "
            f"{what}"
        ) from error
    except LoratoolError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown(url)}: cannot be opened: {_scrubbed(error, url)}; check the URL"
        ) from error


@contextmanager
def reading(place: Place, name: str = "") -> Iterator[None]:
    """Raise ReadError for whatever a storage library raises, which shares no base class."""
    try:
        yield
    except (LoratoolError, *_BUGS):
        raise
    except Exception as error:
        kind = _kind(error)
        message = {
            "permission": f"no permission to read it: {_credentials(place)}",
            "missing": "nothing is there; check the URL",
            "away": f"cannot be reached ({_scrubbed(error, place.url)}); try again: what has come "
            "is kept",
        }.get(kind, f"cannot be read: {_scrubbed(error, place.url)}")
        raise ReadError(
            f"{_label(place, name)}: {message}", kind == "missing", kind == "away"
        ) from error


@contextmanager
def writing(place: Place, name: str = "") -> Iterator[None]:
    """Raise OutputError for whatever a storage library raises."""
    try:
        yield
    except (LoratoolError, *_BUGS):
        raise
    except Exception as error:
        message = {
            "permission": f"no permission to write there: {_credentials(place)}",
            "missing": "the bucket or directory does not exist; create it first",
            "away": f"cannot be reached ({_scrubbed(error, place.url)}); try again: what has "
            "been sent is not sent again",
            "unable": f"{place.protocol}:// can only be read; publish somewhere else",
        }.get(_kind(error), f"cannot be written: {_scrubbed(error, place.url)}")
        raise OutputError(f"{_label(place, name)}: {message}") from error


def _label(place: Place, name: str) -> str:
    return f"{place.name.rstrip('/')}/{name}" if name else place.name


def _credentials(place: Place) -> str:
    usual = f"see where fsspec looks for the credentials of {place.protocol}://"
    return _CREDENTIALS.get(place.protocol, usual)


def _kind(error: BaseException) -> str:
    chain = list(_chain(error))
    statuses = [status for status in map(_status, chain) if status]
    names = [type(link).__name__ for link in chain]
    if any(status in (401, 403, 407) for status in statuses):
        return "permission"
    if any(isinstance(link, NotImplementedError) for link in chain):
        return "unable"
    if any(isinstance(link, PermissionError) for link in chain):
        return "permission"
    if any("Credentials" in name or "TokenRetrieval" in name for name in names):
        return "permission"
    if any(status == 429 or status >= 500 for status in statuses):
        return "away"
    if any(isinstance(link, ConnectionError | TimeoutError | EOFError) for link in chain):
        return "away"
    if any(part in name for name in names for part in _UNREACHABLE):
        return "away"
    if any(isinstance(link, OSError) and link.errno in _BUSY for link in chain):
        return "away"
    if any(isinstance(link, FileNotFoundError) for link in chain) or 404 in statuses:
        return "missing"
    return "other"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Any) -> int:
    """The HTTP status that a library's exception carries, wherever it does; 0 if none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    for holder, name in ((error, "status"), (error, "status_code"), (response, "status_code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return 0


def _scrubbed(error: BaseException, url: str) -> str:
    """A stranger's message on one line, without the secrets of the URL."""
    links = [link for link in _chain(error) if str(link)]
    text = str(links[-1]) if links else type(error).__name__
    for part in url.split("::"):
        text = text.replace(part, shown(part))
    for secret in sorted(_secrets(url), key=len, reverse=True):
        text = text.replace(secret, "***")
    return shown(" ".join(text.split()))[:300]


def _secrets(url: str) -> set[str]:
    """The passwords and queries of a URL, as they are and decoded."""
    found: set[str] = set()
    for match in re.finditer(r"://([^/?#]*)@", url):
        found |= {match[1], match[1].partition(":")[2]}
    for match in re.finditer(r"https?://[^?#\s]*[?#](.+)", url):
        found.add(match[1])
    return {secret for text in found for secret in (text, unquote(text)) if secret}
