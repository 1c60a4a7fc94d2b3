"""Every place that fsspec reaches: s3://, gs://, az://, https://, sftp://, memory:// and more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loratool.publication import Publication, Published, Publishing
from loratool.refs import Ref


@dataclass(frozen=True)
class Fsspec:
    """URLs of directories, or of single files.

    Opening reads the listing, and headers by ranges. Files come when they are read and stay in
    $XDG_CACHE_HOME/loratool/fsspec (~/.cache), one directory for each state of a URL: caches of
    fsspec in front (`simplecache::`) are passed over. A `file://` URL is its path, without a copy.
    Credentials are those that fsspec's implementations find by themselves.

    Object stores have no directories that could be replaced at once. Publishing therefore takes
    away first what makes the old state loadable, and puts up last what makes the new one so: who
    reads meanwhile, or after an upload that was cut, finds nothing to load rather than a mixture.
    """

    def holds(self, ref: Ref) -> bool:
        """Whether it is a URL whose protocol fsspec has heard of."""
        if ref.url is None:
            return False
        from loratool_plugins.stores._fsspec_place import is_known

        return is_known(ref.url)

    def fetch(self, ref: Ref) -> Path:
        """The place of the directory, or the file, in the cache, as a mirror.

        Raises:
            InputError: it is not there, may not be read, cannot be reached or listed, names what
                could lie outside, or needs a package that is not installed.
        """
        from loratool_plugins.stores._fsspec_errors import opening, reading
        from loratool_plugins.stores._fsspec_listing import list_place
        from loratool_plugins.stores._fsspec_mirror import mirror
        from loratool_plugins.stores._fsspec_place import connect

        url = ref.url or ref.text
        with opening(url):
            place = connect(url)
        if place.is_local:
            with reading(place):
                return Path(place.fs.info(place.root)["name"])
        return mirror(place, list_place(place))

    def publish(self, publication: Publication, ref: Ref, how: Publishing) -> Published:
        """Send what is new, and remove what the publication has no more.

        Raises:
            OutputError: the place cannot be written, or holds something else.
            UsageError: a tag, a revision, a pull request or privacy, which only the Hub has.
        """
        from loratool_plugins.stores._fsspec_errors import opening
        from loratool_plugins.stores._fsspec_place import connect
        from loratool_plugins.stores._fsspec_publish import publish

        url = ref.url or ref.text
        with opening(url):
            place = connect(url)
        return publish(publication, place, how)
