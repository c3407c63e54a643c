"""What can go wrong on the way to a base."""

from __future__ import annotations


class BaseError(Exception):
    """A base that cannot be had. The message says why and what to do."""


class BaseSpecError(BaseError, ValueError):
    """What was asked for is neither the default base, nor a folder with a model, nor a repository id."""


class BaseFetchError(BaseError, RuntimeError):
    """The base could not be downloaded, or what came is not what it should be."""
