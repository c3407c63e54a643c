"""Confine the process that talks to the Hub, so that nothing it receives can harm this machine.

Landlock (Linux 5.13 and later) needs no privileges: the process gives up rights of its own, for good. It then
reads what Python and certificates need, writes into its own folders, starts no program and, as far as the
kernel supports it, listens on no port and signals no process but itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_NO_NEW_PRIVS = 38

# Rights on files, by their bits; the numbers are versions of Landlock.
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE, _MAKE_LINK = 1 << 4, 1 << 5, 1 << 7, 1 << 8, 1 << 12
_RENAME, _TRUNCATE = 1 << 13, 1 << 14
_KNOWN = {1: 13, 2: 14, 3: 15, 4: 15}
_MOST_KNOWN = 16
_BIND_TCP, _FROM_BIND = 1 << 0, 4
_SCOPES, _FROM_SCOPES = 0b11, 6  # abstract sockets, signals

_READ = _READ_FILE | _READ_DIR
_WRITE = (
    _READ
    | _WRITE_FILE
    | _REMOVE_DIR
    | _REMOVE_FILE
    | _MAKE_DIR
    | _MAKE_FILE
    | _MAKE_LINK
    | _RENAME
    | _TRUNCATE
)
_OF_FILES = _WRITE_FILE | _READ_FILE | _TRUNCATE
"""Rights that apply to a file as well as to a folder."""

OPEN_FILES = 256
MEMORY = 4 << 30
"""Limit of private writable memory, in bytes."""

_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share", "/etc/ssl", "/etc/pki",
    "/etc/ca-certificates", "/etc/crypto-policies", "/etc/hosts", "/etc/host.conf", "/etc/resolv.conf",
    "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols", "/etc/localtime",
    "/etc/ld.so.cache", "/etc/mime.types", "/dev/null", "/dev/urandom",
)  # fmt: skip
_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class ConfinementError(RuntimeError):
    """The kernel has Landlock, but could not confine the process."""


def landlock_version() -> int:
    """Return the kernel's version of Landlock; 0 if it has none, or it is switched off."""
    try:
        return max(0, _call(_CREATE_RULESET, None, 0, _VERSION_FLAG))
    except OSError:
        return 0


def confine(writable: Iterable[Path], readable: Iterable[Path], *, file_bytes: int) -> None:
    """Give up all rights that this process does not need. Call it before a second thread starts.

    Args:
        writable: existing folders. readable: files and folders, besides those of Python and the system.
        file_bytes: size of the largest file that it may write.

    Raises ConfinementError; without Landlock only the limits hold.
    """
    _limit(file_bytes)
    version = landlock_version()
    if not version:
        return
    rules = [(path, _WRITE) for path in writable]
    rules += [(path, _READ) for path in (*_python(), *map(Path, _SYSTEM), *_certificates(), *readable)]
    try:
        _restrict(version, [*rules, (Path("/dev/null"), _READ | _WRITE_FILE)])
    except OSError as error:
        raise ConfinementError(f"Landlock {version} did not confine the process: {error}") from error


def _limit(file_bytes: int) -> None:
    wanted = {
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_DATA: MEMORY,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in wanted.items():
        _, hard = resource.getrlimit(what)
        chosen = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (chosen, chosen))


def _python() -> list[Path]:
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *sys.path}
    return [Path(place) for place in places if place]


def _certificates() -> list[Path]:
    given = (os.environ.get(name, "").split(os.pathsep) for name in _CERTIFICATES)  # folders may be several
    return [Path(value) for values in given for value in values if value]


def _restrict(version: int, rules: Iterable[tuple[Path, int]]) -> None:
    known = (1 << _KNOWN.get(version, _MOST_KNOWN)) - 1
    attributes = struct.pack("=Q", known)
    if version >= _FROM_BIND:
        attributes += struct.pack("=Q", _BIND_TCP)
    if version >= _FROM_SCOPES:
        attributes += struct.pack("=Q", _SCOPES)
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path, rights in rules:
            _allow(ruleset, path, rights & known)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "no_new_privs")
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    """Allow rights on a file, or on a folder with all in it; a missing path is skipped."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    try:
        if not path.is_dir():
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, place)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)


def _call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call and return its result. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    passed = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *passed)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
