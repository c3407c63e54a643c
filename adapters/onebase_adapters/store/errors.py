"""What can go wrong with stored files.

StoreError
├── StoreFullError       no space, or the quota is used up; nothing that was stored is lost
├── BlobMissingError     no such blob
└── BlobDamagedError     the content is not what its name says
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""`EFBIG` too: the limit on a file's size (RLIMIT_FSIZE, or the disk's own) ends a write in the same way."""


class StoreError(Exception):
    """The store could not do it; the message says what and where, without credentials."""


class StoreFullError(StoreError):
    """No space is left where blobs are kept. What was stored before is whole; later writes work again
    once there is space."""


class BlobMissingError(StoreError):
    """The store has no blob of that name."""


class BlobDamagedError(StoreError):
    """A stored file whose content does not have the SHA-256 that it is named by."""


@contextmanager
def store_errors(doing: str) -> Iterator[None]:
    """Turn what the operating system says into StoreError or StoreFullError. `doing`: for the message."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StoreFullError(f"No space is left while {doing}: free some, then try again.") from error
        raise StoreError(f"The store failed while {doing}: {error}") from error
