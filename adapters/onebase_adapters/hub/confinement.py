"""Confine a process: the one that talks to the Hub, so that nothing it receives can harm this machine, and
those that run code of strangers.

Landlock (Linux 5.13 and later) needs no privileges: the process gives up rights of its own, for good. It then
reads what Python and certificates need, writes into its own folders, starts no program and, as far as the
kernel supports it, listens on no port and signals no process but itself.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import resource
import struct
import sys
import sysconfig
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
        _lower(what, most)


def _lower(what: int, most: int) -> None:
    """Lower a limit of this process for good, unless it is lower already."""
    _, hard = resource.getrlimit(what)
    chosen = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(what, (chosen, chosen))


def _python() -> list[Path]:
    """Return the places of Python and its modules. An empty entry of PYTHONPATH, which stands for the working
    folder, opens nothing."""
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *sys.path} - {""}
    if "" in os.environ.get("PYTHONPATH", "x").split(os.pathsep):
        places.discard(str(Path.cwd()))
    return [Path(place) for place in places]


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


# ---- code of strangers -----------------------------------------------------------------------------

PROCESSOR_SECONDS = 75
"""Processor time, in seconds, after which the kernel ends a process that runs code of a stranger."""
_LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/localtime",
    "/etc/ld.so.cache", "/dev/urandom",
)  # fmt: skip
_SET_SECCOMP, _GET_SECCOMP, _FILTER = 22, 21, 2
_NO_CAPABILITIES = struct.pack("=Ii", 0x20080522, 0), bytes(24)  # third version of capset, for this process
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUALS, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

# Calls that Python makes once it runs, by their numbers on x86_64 and on aarch64; None where there is no such
# call. Any other one is refused, also those of x86's third ABI, whose numbers are higher.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # open files, and names: modules are looked for in folders
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "lseek": (8, 62), "close": (3, 57), "fstat": (5, 80), "newfstatat": (262, 79), "getdents64": (217, 61),
    "getcwd": (79, 17),
    # memory
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "brk": (12, 214),
    "madvise": (28, 233),
    # its own signals and locks
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "futex": (202, 98), "sched_yield": (24, 124),
    # time, and what the process is
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153),
    "getrusage": (98, 165), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "uname": (63, 160), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
_FCNTL, _OPENAT = (72, 25), (257, 56)
_FCNTL_COMMANDS = (1, 2, 3, 1030)
"""F_GETFD, F_SETFD, F_GETFL and F_DUPFD_CLOEXEC. Others have the kernel send signals to any process."""
_CHANGING_FLAGS = 0o1 | 0o2 | 0o100 | 0o1000 | 0o20000 | 0o10000000
"""O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_ASYNC and O_PATH. Landlock refuses O_TRUNC from its third version
on."""


def can_confine_code() -> bool:
    """Return True if this kernel and machine can confine code of a stranger."""
    has_filters = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
    return bool(landlock_version()) and has_filters and os.uname().machine in _MACHINES


def confine_code(memory: int) -> None:
    """Confine this process to computing, for code of a stranger: call it before a second thread starts.

    It then reads the folders of the standard library and of the system's libraries, with all that lies in
    them (`site-packages`, and every file below `/usr/lib` and `/usr/local/lib`), the time zones and random
    numbers, and no other file; it writes none, reaches no network and no other process, and starts no process
    and no thread. It can ask whether a path exists, and for its size and times, since modules are found by
    that.

    Args:
        memory: bytes that it may take beyond what it has.

    Raises ConfinementError, OSError: it is not confined.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    version = landlock_version()
    if not version:
        raise ConfinementError("this kernel has no Landlock")
    _limit(0)
    limit_memory(used + memory)
    _lower(resource.RLIMIT_CPU, PROCESSOR_SECONDS)
    own = _standard_library()
    sys.path[:] = [path for path in sys.path if Path(path) in own]
    libraries = [*own, Path(sys.base_prefix, "lib"), *map(Path, _LIBRARIES)]
    _restrict(version, [(path, _READ) for path in libraries])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(*_NO_CAPABILITIES):
        raise OSError(ctypes.get_errno(), "the capabilities are not given up")
    _refuse_calls()


def _standard_library() -> set[Path]:
    """Return the folders, or archive, in which the modules of the standard library are."""
    modules = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    found = {
        *modules,
        *(path / "lib-dynload" for path in modules),
        *(path.parent / archive for path in modules),
    }
    dynamic = importlib.util.find_spec("_json")  # some have their extension modules elsewhere
    if dynamic is not None and dynamic.has_location and dynamic.origin:
        found.add(Path(dynamic.origin).parent)
    return found


def limit_memory(most: int) -> None:
    """Limit the addresses of this process, in bytes."""
    _lower(resource.RLIMIT_AS, most)


def _refuse_calls() -> None:
    """Have the kernel refuse all calls but those of _CALLS from now on. Raises ConfinementError, OSError."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise ConfinementError(f"the system calls of {machine} are not known here")
    column = list(_MACHINES).index(machine)
    numbers = sorted(found for pair in _CALLS.values() if (found := pair[column]) is not None)
    fcntl = [_operation(_LOAD, _FIRST_ARGUMENT_AT + 8)]
    for command in _FCNTL_COMMANDS:
        fcntl += [_operation(_EQUALS, command, 0, 1), _operation(_RETURN, _ALLOW)]
    program = [
        _operation(_LOAD, _MACHINE_AT),
        _operation(_EQUALS, _MACHINES[machine], 1, 0),
        _operation(_RETURN, _KILL),
        _operation(_LOAD, _NUMBER_AT),
        _operation(_EQUALS, _OPENAT[column], 0, 4),
        _operation(_LOAD, _FIRST_ARGUMENT_AT + 16),
        _operation(_ANY_BIT, _CHANGING_FLAGS, 0, 1),
        _operation(_RETURN, _REFUSE),
        _operation(_RETURN, _ALLOW),
        _operation(_EQUALS, _FCNTL[column], 0, len(fcntl) + 1),
        *fcntl,
        _operation(_RETURN, _REFUSE),
    ]
    for number in numbers:
        program += [_operation(_EQUALS, number, 0, 1), _operation(_RETURN, _ALLOW)]
    code = b"".join([*program, _operation(_RETURN, _REFUSE)])
    lines = ctypes.create_string_buffer(code)
    filters = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(lines))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")
    if libc.prctl(_GET_SECCOMP, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != errno.EPERM:
        raise ConfinementError("the kernel took a filter of system calls, and does not apply it")


def _operation(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Return one instruction of a classic BPF program, as linux/filter.h has it."""
    return struct.pack("=HBBI", code, then, otherwise, value)
