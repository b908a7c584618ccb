"""A process confines itself, and then tests what it can still do. Linux, without root, by ctypes alone.

There are four layers. If one of them is not available, the others still hold:

- limits (``setrlimit``): CPU time, memory, size and number of files, no core file;
- namespaces (``unshare``): a user namespace without rights outside it, a network without any interface, and a tmpfs of
  its own. So files that candidate code writes are never on a disk, and are gone with the process;
- Landlock: files can be read where the interpreter and its libraries are, and written in that tmpfs;
- seccomp: only the system calls on a list are allowed; no new process, no socket, no signal to another process, no
  ptrace, no limits of others. A list of forbidden calls would not be safe, because new kernels have new calls.

None of these is taken for granted: `held` tries things that should not be possible. This module imports only the
standard library, since the process that confines itself has nothing else.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["confine", "held"]

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 2, 4, 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_THREAD: Final = 0x10000


def confine(limits: Mapping[str, int], *, threads: bool) -> None:
    """Give up as many rights as the kernel supports; `held` then finds those that are left.

    Parameters
    ----------
    limits : mapping
        ``cpu_s``, ``memory``, ``file_size``, ``files`` (open at once), ``threads``, ``folder_size``.
    threads : bool
        Whether threads may be started.
    """
    parent = os.getppid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before prctl took effect
        os._exit(1)
    readable = [(path, _open(path)) for path in _readable()]
    folder = _namespaces(limits["folder_size"], readable)
    os.chdir(folder or "/")
    _limit(limits)
    _drop_capabilities()
    _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    _landlock([file for _, file in readable if file >= 0], folder)
    for _, file in readable:
        if file >= 0:
            os.close(file)
    _seccomp(threads)


def held(secret: str) -> dict[str, bool]:
    """Try forbidden actions: for ``files``, ``network``, ``signals``, ``processes``, return whether they failed.

    Parameters
    ----------
    secret : str
        A file that could be read before.
    """
    return {
        "files": not any(map(_can_read, (secret, "/etc/passwd"))) and not _can_write(),
        "network": not _can_connect(),
        "signals": _LIBC.kill(os.getppid(), 0) != 0,
        "processes": not _can_fork(),
    }


def _can_read(path: str) -> bool:
    try:
        with open(path, "rb"):
            return True
    except OSError:
        return False


def _can_write() -> bool:
    """Whether a file can be written outside the process's own folder, where any user may write."""
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        path = f"{folder}/tts-search-{os.getpid()}"
        if os.path.realpath(folder) == os.getcwd():
            continue
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            continue
        os.close(file)
        os.unlink(path)
        return True
    return False


def _can_connect() -> bool:
    """Whether a datagram socket can be bound to the loopback device. In a new network namespace this device is down."""
    file = _LIBC.socket(2, 2, 0)
    if file < 0:
        return False
    address = struct.pack("=HH4s8x", 2, 0, bytes([127, 0, 0, 1]))
    can: bool = _LIBC.bind(file, address, len(address)) == 0
    os.close(file)
    return can


def _can_fork() -> bool:
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return True


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return -1


def _readable() -> list[str]:
    """Files that Python reads after its start: its library, and the libraries of its extension modules."""
    library = os.path.dirname(os.__file__)
    return [library, os.path.join(library, "lib-dynload"), "/lib", "/lib64", "/usr/lib", "/usr/lib64", *_devices()]


def _devices() -> tuple[str, ...]:
    return "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom"


def _namespaces(folder_size: int, readable: Iterable[tuple[str, int]]) -> str | None:
    """Enter new namespaces. Return the folder with a writable tmpfs, or None if there is none."""
    uid, gid = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS) != 0:
        return None
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError:
        return None
    used = [os.path.realpath(path) for path, _ in readable]
    for folder in ("/tmp", "/var/tmp", "/mnt"):
        if os.path.isdir(folder) and not any(path.startswith(folder + "/") for path in used):
            options = f"size={folder_size},nr_inodes=1024,mode=0700".encode()
            _LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            if _LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, options) == 0:
                return folder
    return None


def _limit(limits: Mapping[str, int]) -> None:
    # With a soft limit below the hard one, the kernel would send a signal that candidate code can catch.
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_s"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["file_size"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, limits["threads"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _drop_capabilities() -> None:
    header = struct.pack("=Ii", 0x20080522, 0)
    _LIBC.capset(header, bytes(24))


# Bits of Landlock: write, read, list, remove a folder or a file, make a folder, a file or a link; nothing is executed.
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_CHANGE: Final = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 12 | 1 << 14


def _landlock(readable: Iterable[int], folder: str | None) -> None:
    version = _LIBC.syscall(444, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return
    files = (1 << 13) - 1
    for since, bit in ((2, 13), (3, 14), (5, 15)):
        files |= (1 << bit) if version >= since else 0
    rules = struct.pack("=QQQ", files, 3, 3 if version >= 6 else 0)  # no TCP; no signals, no abstract sockets
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _LIBC.syscall(444, rules, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return
    for file in readable:
        is_folder = (os.fstat(file).st_mode & 0o170000) == 0o040000
        _LIBC.syscall(
            445, ruleset, 1, struct.pack("=Qi", _READ_FILE | (_READ_DIR if is_folder else _WRITE_FILE), file), 0
        )
    if folder is not None:
        own = _open(folder)
        written = (_READ_FILE | _READ_DIR | _WRITE_FILE | _CHANGE) & files
        _LIBC.syscall(445, ruleset, 1, struct.pack("=Qi", written, own), 0)
        os.close(own)
    _LIBC.syscall(446, ruleset, 0)
    os.close(ruleset)


# Allowed system calls by number on x86-64 and on aarch64 (None: aarch64 does not have it).
_CALLS: Final[Mapping[str, tuple[int, int | None]]] = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "close": (3, 57), "stat": (4, None), "fstat": (5, 80),
    "lstat": (6, None), "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226),
    "munmap": (11, 215), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "access": (21, None), "pipe": (22, None), "select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216),
    "msync": (26, 227), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None), "pause": (34, None),
    "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None), "setitimer": (38, 103),
    "getpid": (39, 172), "sendfile": (40, 71), "exit": (60, 93), "uname": (63, 160), "flock": (73, 32),
    "fsync": (74, 82), "fdatasync": (75, 83), "truncate": (76, 45), "ftruncate": (77, 46), "getdents": (78, None),
    "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None), "mkdir": (83, None),
    "rmdir": (84, None), "creat": (85, None), "link": (86, None), "unlink": (87, None), "symlink": (88, None),
    "readlink": (89, None), "chmod": (90, None), "fchmod": (91, 52), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153),
    "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getpgrp": (111, None), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43), "fstatfs": (138, 44),
    "gettid": (186, 178), "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "set_tid_address": (218, 96), "restart_syscall": (219, 128), "fadvise64": (221, 223),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "epoll_wait": (232, None), "epoll_ctl": (233, 21), "openat": (257, 56), "mkdirat": (258, 34),
    "newfstatat": (262, 79), "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78),
    "fchmodat": (268, 53), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "utimensat": (280, 88), "epoll_pwait": (281, 22), "fallocate": (285, 47),
    "epoll_create1": (291, 20), "dup3": (292, 24), "pipe2": (293, 59), "renameat2": (316, 276),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
# System calls whose first or second argument must be one of a few values.
_IOCTL, _FCNTL, _TGKILL, _PRLIMIT, _CLONE, _CLONE3 = (16, 29), (72, 25), (234, 131), (302, 261), (56, 220), (435, 435)
_IOCTLS: Final = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)  # is it a terminal, bytes to read, blocking, close-on-exec
_FCNTLS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 1030)  # duplicate, flags, locks; not the owner of a file's signals
_AUDIT: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _DENY, _NO_SUCH_CALL, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000


def _seccomp(threads: bool) -> None:
    machine = platform.machine()
    if machine not in _AUDIT or sys.byteorder != "little":
        return
    filter_ = _program(machine, threads, os.getpid())
    code = ctypes.create_string_buffer(filter_, len(filter_))
    program = struct.pack("=H6xQ", len(filter_) // 8, ctypes.addressof(code))
    _LIBC.prctl(_PR_SET_SECCOMP, 2, program, 0, 0)


def _program(machine: str, threads: bool, pid: int) -> bytes:
    """The filter as BPF. An instruction is a code, two jump distances (condition true, false), and a number."""
    column = 0 if machine == "x86_64" else 1
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # the calls of x32 have numbers of their own
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for numbers in _CALLS.values():
        if (number := numbers[column]) is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for numbers, argument, values in (
        (_IOCTL, 1, _IOCTLS),
        (_FCNTL, 1, _FCNTLS),
        (_TGKILL, 0, (pid,)),  # abort() sends a signal to itself
        (_PRLIMIT, 0, (0, pid)),
    ):
        lines += _if_call(numbers[column], _if_argument(argument, values))
    if threads:
        lines += _if_call(_CLONE[column], [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW)])
    # glibc can do without these calls if they do not exist, but not if they are denied.
    lines += _if_call(_CLONE3[column], [(_RETURN, 0, 0, _NO_SUCH_CALL)])
    lines.append((_RETURN, 0, 0, _DENY))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


_Line = tuple[int, int, int, int]


def _if_call(number: int, lines: list[_Line]) -> list[_Line]:
    """Instructions for one call, followed by the denial of it."""
    lines = [*lines, (_RETURN, 0, 0, _DENY)]
    return [(_EQUAL, 0, len(lines), number), *lines]


def _if_argument(argument: int, values: Iterable[int]) -> list[_Line]:
    """Allow if an argument has one of some 32-bit values: commands and process ids have 32 bits."""
    lines: list[_Line] = [(_LOAD, 0, 0, 16 + 8 * argument)]
    for value in values:
        lines += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    return lines
