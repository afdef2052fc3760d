# SPDX-License-Identifier: Apache-2.0
"""Give up privileges before the first byte of a front-end is read.

In this order: limits, user and group, capabilities, the right to gain privileges (no_new_privs),
files outside its folders (Landlock), and all system calls that serving a balloon does not need
(seccomp).  A system call that is not allowed does not run: the process writes one line that names
it and ends with status 159, and its keeper starts another one.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import logging
import os
import resource
import signal
import termios
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyseccomp

from vballoon.errors import UsageError
from vballoon.keeper import landlock
from vballoon.native import guard

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("EXIT_REFUSED", "Limits", "Policy", "SandboxMode", "enter", "system_call_name")

log = logging.getLogger(__name__)

EXIT_REFUSED = 128 + signal.SIGSYS
"""Exit status of a process that made a system call which the sandbox refuses."""

_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_CLONE_THREAD = 0x00010000
_PROT_EXEC = 0x4
_FIONBIO = 0x5421


class SandboxMode(enum.Enum):
    """How much of the sandbox is in force."""

    OFF = "off"
    """Nothing; for debuggers."""
    ON = "on"
    LOG = "log"
    """System calls that ON would refuse run, and the kernel's audit log names them."""


@dataclass(frozen=True)
class Limits:
    """Resource limits of a worker."""

    descriptors: int = 4096
    """Open descriptors: 509 memory slots, 1024 queues with three eventfds each, and some."""
    data_bytes: int = 2 << 30
    """RLIMIT_DATA: private writable memory. Guest memory is shared and does not count."""


@dataclass(frozen=True)
class Policy:
    """What a worker keeps. *folders* are descriptors of the directories that it may use."""

    name: str
    mode: SandboxMode = SandboxMode.ON
    user: int | None = None
    """User and group to become; None: stay. Only root can change them."""
    group: int | None = None
    folders: tuple[int, ...] = ()
    limits: Limits = Limits()


def enter(policy: Policy) -> None:
    """Give up everything that *policy* does not keep; there is no way back.

    Call it in the worker, with a single thread. Raise
    :class:`~vballoon.errors.UsageError` where this host cannot do it.
    """
    if policy.mode is SandboxMode.OFF:
        return
    try:
        _limit(policy.limits)
        _become(policy.user, policy.group)
        _drop_capabilities()
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 0)  # no ptrace and no /proc/PID/mem by this user's processes
        if policy.mode is SandboxMode.ON:
            if landlock.restrict_to(policy.folders) == 0:
                log.warning(
                    "%s: this kernel has no Landlock; files are not restricted", policy.name
                )
            guard.report_sigsys(f"vballoon: {policy.name}: the sandbox refused system call ")
        _filter(policy.mode).load()
    except OSError as error:
        raise UsageError(f"{policy.name}: sandbox: {error.strerror or error}") from error


def system_call_name(number: int) -> str:
    """Return the name of system call *number* of this architecture, or the number as text."""
    try:
        name = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, number)
    except (ValueError, OSError):
        return str(number)
    return name.decode() if isinstance(name, bytes) else str(name)


# ---- privileges ----


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    padded = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if libc.prctl(ctypes.c_int(option), *padded) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _limit(limits: Limits) -> None:
    _, ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)
    if ceiling == resource.RLIM_INFINITY or ceiling > limits.descriptors:
        ceiling = limits.descriptors
    resource.setrlimit(resource.RLIMIT_NOFILE, (ceiling, ceiling))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.data_bytes, limits.data_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold guest memory


def _become(user: int | None, group: int | None) -> None:
    if os.geteuid() != 0:
        return
    if group is not None:
        os.setgroups([])
        os.setresgid(group, group, group)
    if user is not None:
        os.setresuid(user, user, user)


def _drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break  # the kernel's last one was the one before
            if error.errno == errno.EPERM:
                break  # not root, so there is none to lose
            raise
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if libc.capset(header, nothing) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# ---- system calls ----

_ALLOWED = {
    "read and write": """read write readv writev pread64 pwrite64 preadv pwritev lseek sendfile
        copy_file_range""",
    "sockets that are open": """sendmsg sendto recvmsg recvfrom accept accept4 shutdown getsockopt
        setsockopt getsockname getpeername socketpair""",
    "descriptors": """close close_range dup dup2 dup3 pipe2 fstat newfstatat stat lstat statx
        fstatfs kcmp memfd_create eventfd2""",
    "files, which Landlock restricts": """openat mkdirat unlinkat renameat renameat2 linkat
        readlinkat readlink faccessat faccessat2 mkdir rename unlink rmdir access getdents64 getcwd
        umask fchmod fchmodat fsync fdatasync ftruncate fallocate""",
    "waiting": """epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll select
        pselect6 clock_nanosleep nanosleep restart_syscall""",
    "eventfds, see native.guard": "io_setup io_submit io_getevents io_pgetevents io_destroy",
    "memory": "munmap mremap madvise msync mincore brk membarrier",
    "threads": """futex futex_wait futex_wake set_robust_list rseq sched_yield
        sched_getaffinity""",
    "signals": "rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack",
    "questions": """clock_gettime clock_getres gettimeofday time getpid gettid getppid getuid
        geteuid getgid getegid getrusage getrandom uname sysinfo""",
    "the end": "exit exit_group",
}
"""System calls of sessions with walks, hints, exports, snapshots and events, by purpose."""
_REFUSED_SOFTLY = ("clone3", "set_mempolicy", "prctl")
"""System calls that glibc and libraries try, and that may fail."""


def _filter(mode: SandboxMode) -> pyseccomp.SyscallFilter:
    allow = pyseccomp.ALLOW
    default = pyseccomp.TRAP if mode is SandboxMode.ON else pyseccomp.LOG
    rules = pyseccomp.SyscallFilter(default)
    for name in _known(" ".join(_ALLOWED.values()).split()):
        rules.add_rule(allow, name)
    for name in _known(_REFUSED_SOFTLY):
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), name)
    threads = pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, _CLONE_THREAD)
    rules.add_rule(allow, "clone", threads)
    no_code = pyseccomp.Arg(2, pyseccomp.MASKED_EQ, _PROT_EXEC, 0)
    rules.add_rule(allow, "mprotect", no_code)
    rules.add_rule(allow, "mmap", no_code)
    for request in (_FIONBIO, termios.FIONREAD, termios.FIOCLEX, termios.TCGETS):
        rules.add_rule(allow, "ioctl", pyseccomp.Arg(1, pyseccomp.EQ, request))
    for command in _FCNTL:
        rules.add_rule(allow, "fcntl", pyseccomp.Arg(1, pyseccomp.EQ, command))
    own = pyseccomp.Arg(0, pyseccomp.EQ, os.getpid())
    rules.add_rule(allow, "tgkill", own)
    rules.add_rule(allow, "kill", own)
    only_read = pyseccomp.Arg(2, pyseccomp.EQ, 0)
    rules.add_rule(allow, "prlimit64", only_read)
    return rules


_FCNTL = (
    fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL,
    fcntl.F_SETFL, fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS, fcntl.F_GETLK, fcntl.F_SETLK,
)  # fmt: skip
"""Not F_SETOWN and F_SETSIG, which send signals to other processes."""


def _known(names: tuple[str, ...] | list[str]) -> Iterator[str]:
    """Yield those of *names* that this version of libseccomp knows on this architecture."""
    for name in names:
        try:
            known = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name)
        except (ValueError, OSError):
            continue
        if known != -1:
            yield name
