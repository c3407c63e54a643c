"""Confine a process: the one that talks to the Hub, so that nothing it receives can harm this machine, and
those that run code of strangers.

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


# ---- system calls ----------------------------------------------------------------------------------

_SET_SECCOMP, _FILTER = 22, 2
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUALS, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _MACHINE_AT = 0, 4
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_OTHER_ABI = 0x40000000
"""First number of the calls of x86's third ABI, which would pass by the numbers of the first."""

# Numbers on x86_64 and on aarch64; None where there is no such call.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    # network, and messages to other processes
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200),
    "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180),
    # other processes and programs
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "kcmp": (312, 272),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "setpgid": (109, 154), "setsid": (112, 157),
    # what files are, besides their content
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "truncate": (76, 45), "memfd_create": (319, 279),
    "flock": (73, 32),
    # the system
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "reboot": (169, 142),
    "settimeofday": (164, 170), "sethostname": (170, 161), "syslog": (103, 116),
}  # fmt: skip


def can_confine_code() -> bool:
    """Return True if this kernel and machine can confine code of a stranger."""
    has_filters = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
    return bool(landlock_version()) and has_filters and os.uname().machine in _MACHINES


def confine_code(memory: int) -> None:
    """Confine this process to computing, for code of a stranger: call it before a second thread starts.

    It then reads what Python needs and no other file, writes none, reaches no network and no other process,
    starts none and no thread.

    Args:
        memory: bytes that it may take beyond what it has.

    Raises ConfinementError, OSError: it is not confined.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if not landlock_version():
        raise ConfinementError("this kernel has no Landlock")
    confine([], [], file_bytes=0)
    limit_memory(used + memory)
    _refuse_calls()


def limit_memory(most: int) -> None:
    """Limit the addresses of this process, in bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _refuse_calls() -> None:
    """Have the kernel refuse the calls of _CALLS from now on. Raises ConfinementError, OSError."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise ConfinementError(f"the system calls of {machine} are not known here")
    column = list(_MACHINES).index(machine)
    numbers = sorted(found for pair in _CALLS.values() if (found := pair[column]) is not None)
    program = [
        _operation(_LOAD, _MACHINE_AT),
        _operation(_EQUALS, _MACHINES[machine], 1, 0),
        _operation(_RETURN, _KILL),
        _operation(_LOAD, _NUMBER_AT),
        _operation(_AT_LEAST, _OTHER_ABI, 0, 1),
        _operation(_RETURN, _REFUSE),
    ]
    for number in numbers:
        program += [_operation(_EQUALS, number, 0, 1), _operation(_RETURN, _REFUSE)]
    code = b"".join([*program, _operation(_RETURN, _ALLOW)])
    lines = ctypes.create_string_buffer(code)
    filters = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(lines))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SET_SECCOMP, _FILTER, filters, 0, 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter of system calls")


def _operation(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    """Return one instruction of a classic BPF program, as linux/filter.h has it."""
    return struct.pack("=HBBI", code, then, otherwise, value)
