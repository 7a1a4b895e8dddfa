"""What a process may reach: namespaces of its own where the kernel permits, limits and a hook everywhere.

Standard library alone: this runs in the small interpreter that `grading.keeper` is.
"""

import contextlib
import ctypes
import os
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any

# From sched.h, sys/mount.h, linux/prctl.h.
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_RECURSIVE = 442, 0x8000
_SET_DUMPABLE, _SET_CHILD_SUBREAPER, _SET_NO_NEW_PRIVS = 4, 36, 38
_NOBODY = 65534
FOLDER = '/program'  # of a program, where it has a file system of its own


def _libc(name: str, *arguments: Any) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    converted = [
        argument.encode() if isinstance(argument, str) else ctypes.c_ulong(argument)
        if isinstance(argument, int) else argument
        for argument in arguments
    ]  # fmt: skip
    if getattr(library, name)(*converted) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f'{name}: {os.strerror(number)}')


def _quietly(name: str, *arguments: Any) -> None:
    """A layer that some systems do not have."""
    with contextlib.suppress(OSError, AttributeError):
        _libc(name, *arguments)


def enter_namespaces(folder: str) -> int | None:
    """Leaves the machine's network, file system and user behind; of the files only Python's stay, to read.

    Args:
      folder: empty; becomes the place of the new root, and is removed.

    Returns:
      The user to become before foreign code runs; None: one has become nobody already.

    Raises:
      OSError, AttributeError: the kernel does not permit it, and the process may stand half inside.
    """
    user, group = os.getuid(), os.getgid()
    spaces = _NEWNS | _NEWUTS | _NEWIPC | _NEWNET
    other = _stranger() if user == 0 else None
    try:
        if other is None:
            raise PermissionError
        _libc('unshare', spaces)
    except PermissionError:
        other = None
        _libc('unshare', spaces | _NEWUSER)
        for name, line in (
            ('setgroups', 'deny'), ('uid_map', f'{_NOBODY} {user} 1'), ('gid_map', f'{_NOBODY} {group} 1'),
        ):  # fmt: skip
            with open(f'/proc/self/{name}', 'w') as file:
                file.write(line)
    _libc('mount', 'none', '/', 'none', _REC | _PRIVATE, 0)
    _libc('mount', 'tmpfs', folder, 'tmpfs', _NOSUID | _NODEV, 'size=1m,mode=755')
    for path in _readable_paths():
        _bind(path, folder + path)
    for place in (FOLDER, '/old'):
        os.makedirs(folder + place, mode=0o755, exist_ok=True)
    for device in ('null', 'zero', 'random', 'urandom'):
        _bind(f'/dev/{device}', f'{folder}/dev/{device}', read_only=False)
    for place in ('/dev/shm', '/tmp'):
        if not os.path.exists(folder + place):  # Python itself may stand in /tmp
            os.symlink(FOLDER, folder + place)
    _libc('pivot_root', folder, f'{folder}/old')
    os.chdir('/')
    os.rmdir(f'/old{folder}')
    _libc('umount2', '/old', 2)
    os.rmdir('/old')
    _libc('mount', 'tmpfs', '/', 'none', _REMOUNT | _RDONLY | _NOSUID | _NODEV, 0)
    return other


def _stranger() -> int | None:
    """A user whom nothing belongs to; another one for each process where there are so many: limits count by user."""
    with open('/proc/self/uid_map') as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    for user in (1_000_000 + os.getpid(), _NOBODY):
        if any(first <= user < first + count for first, _, count in ranges):
            return user
    return None


def _readable_paths() -> list[str]:
    """Python and what its extension modules link to; nothing of the user's."""
    packages = [path for path in sys.path if path.endswith(('/site-packages', '/dist-packages'))]
    wanted = [
        *packages,
        sys.prefix,
        sys.base_prefix,
        '/usr',
        '/lib',
        '/lib64',
        '/nix/store',
        '/etc/ld.so.cache',
    ]
    found: list[str] = []
    for path in sorted({os.path.abspath(path) for path in wanted if os.path.exists(path)}, key=len):
        if path != '/' and not any(path.startswith(parent + '/') for parent in found):
            found.append(path)
    return found


def _bind(path: str, place: str, read_only: bool = True) -> None:
    os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
    if os.path.isdir(path):
        os.makedirs(place, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
    _libc('mount', path, place, 'none', _BIND | _REC, 0)
    if read_only:  # with all that is mounted below it
        attributes = (ctypes.c_uint64 * 4)(_RDONLY, 0, 0, 0)
        _libc('syscall', _MOUNT_SETATTR, ctypes.c_long(-100), place, _AT_RECURSIVE, attributes, 32)


def enter_own_folder(size: int, user: int | None) -> None:
    """Processes that are forked from here on see each other alone; the folder is in memory, and goes with them."""
    _libc('unshare', _NEWNS | _NEWPID | _NEWIPC)
    options = f'size={size},nr_inodes=4096,mode=700'
    owner = '' if user is None else f',uid={user},gid={user}'
    _libc('mount', 'tmpfs', FOLDER, 'tmpfs', _NOSUID | _NODEV | _NOEXEC, options + owner)
    os.chdir(FOLDER)


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, so that it can end them."""
    _quietly('prctl', _SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def drop_privileges(user: int | None) -> None:
    """Becomes a user who may nothing, for good, whom others of the same user cannot trace."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    if sys.platform == 'linux':
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        _quietly('capset', header, nothing)
        _quietly('prctl', _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _quietly('prctl', _SET_DUMPABLE, 0, 0, 0, 0)


def unprivileged_user() -> int | None:
    """A user to become where there are no namespaces: for root alone, and if that user can still read Python."""
    if sys.platform != 'linux' or os.getuid() != 0:
        return None
    user = _stranger()
    if user is None:
        return None
    child = os.fork()
    if child == 0:
        try:
            drop_privileges(user)
            for path in (os.__file__, socket.__file__):
                with open(path, 'rb') as file:
                    file.read(1)
            os.listdir(os.path.dirname(os.__file__))
        except BaseException:
            os._exit(1)
        os._exit(0)
    return user if os.waitpid(child, 0)[1] == 0 else None


def limit_resources(seconds: float, memory: int, file_size: int, processes: int | None) -> None:
    """Hard limits, which only root could lift again; None leaves the number of processes as it is."""
    limits = {
        resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(seconds) + 1, resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size, resource.RLIMIT_NOFILE: 64,
    }  # fmt: skip
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (value, value))
        except (ValueError, OSError):  # macOS has no limit of addresses
            continue


_REFUSED = (
    'socket.', 'os.fork', 'os.forkpty', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.system', 'os.kill', 'os.killpg',
    'subprocess.Popen', 'pty.spawn', 'ctypes.dlsym', 'ctypes.call_function', 'resource.setrlimit',
    'resource.prlimit', 'ftplib.', 'http.client.', 'imaplib.', 'nntplib.', 'poplib.', 'smtplib.', 'telnetlib.',
    'urllib.Request', 'webbrowser.', 'syslog.', 'sys.addaudithook', 'signal.pthread_kill',
)  # fmt: skip
_CHANGES = (
    'os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate', 'os.chmod', 'os.chown',
    'os.utime', 'os.chflags', 'os.setxattr', 'os.removexattr', 'os.chdir', 'os.fchdir',
)  # fmt: skip


def refuse_in_python(folder: str | None) -> None:
    """Processes and the network are refused by the interpreter; files outside `folder` too, where one is given.

    Reads are left to Python's own files. Native code can get around a hook.
    """
    here = (folder + '/').encode() if folder else b''
    readable = [(path + '/').encode() for path in _readable_paths()] + [
        b'/dev/null',
        b'/dev/urandom',
        b'/dev/zero',
    ]
    sys.addaudithook(_hook(here, tuple(readable)))


_MAX_FOLDERS = 500  # nested folders take long to remove


def _hook(here: bytes, readable: tuple[bytes, ...]) -> Callable[[str, tuple], None]:
    """Uses methods of built-in types alone, and what is bound now: a program may put other things under other names."""
    kind_of, text, raw, number, refuse, length = type, str, bytes, int, PermissionError, len
    refused, changes, most, made = _REFUSED, _CHANGES, _MAX_FOLDERS, []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any, allowed: tuple[bytes, ...]) -> bool:
        path = path.encode('utf-8', 'surrogateescape') if kind_of(path) is text else path
        if kind_of(path) is not raw:
            return False
        path = path if path[:1] == b'/' else here + path
        return b'..' not in path.split(b'/') and (path + b'/').startswith(allowed)

    def hook(event: str, args: tuple) -> None:
        if event.startswith(refused):
            raise refuse(f'the sandbox refuses {event}')
        if not here:
            return
        if event == 'open':
            path, mode, flags = args
            # `os.open` has no mode; what it opens may be a folder, and others be named from there.
            reads = mode is not None and kind_of(flags) is number and not flags & writing
            if kind_of(path) is not number and not inside(path, (here, *readable) if reads else (here,)):
                raise refuse(f'the sandbox refuses to open {path!r}')
        elif event in changes:
            made.extend([event] if event == 'os.mkdir' else ())
            if event in ('os.symlink', 'os.fchdir') or length(made) > most:
                raise refuse(f'the sandbox refuses {event}, or so many of it')
            for path in args:
                if kind_of(path) in (text, raw) and not inside(path, (here,)):
                    raise refuse(f'the sandbox refuses {event} of {path!r}')

    return hook
