"""Files and folders that are written durably, and whose errors are one line with the cure."""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def one_line_errors(path: str | Path) -> Iterator[None]:
    """Turn an error of the operating system into one line about ``path``, with its cure.

    Raises:
        ValueError: in place of OSError.
    """
    try:
        yield
    except OSError as error:
        cure = "choose another place for it"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            cure = "make room, and the same command goes on: what was written whole is kept"
        raise ValueError(f"cannot write {path}: {error.strerror}; {cure}") from error


def check_writable(path: str | Path) -> None:
    """Find out, before anything costly, whether a result file can be written.

    Its folder is made; the file itself is not touched, since another process may be writing it.

    Raises:
        ValueError: no permission, no room, or a folder in its place.
    """
    path = Path(path)
    with one_line_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            kind = errno.EISDIR if path.is_dir() else errno.EINVAL
            raise OSError(kind, "it is no regular file")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        probe = path.with_name(f".{path.name}.probe{os.getpid()}")
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


def aside_of(folder: Path) -> Path:
    """Return where a folder is written before it takes its place: the same for all processes."""
    return folder.with_name(f".{folder.name}.new")


def start_aside(aside: Path) -> None:
    """Make the empty folder to write to; a killed run may have left its own."""
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)


def put_in_place(aside: Path, folder: Path) -> None:
    """Let a complete folder take the place of the earlier one: two renames, then the removal."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def open_locked(path: Path, held: Path | None = None, flag: str = "--output") -> int:
    """Open a file for appending, made where there is none, and lock it (but not on Windows).

    Raises:
        ValueError: another process has the lock: it is writing ``held``, which ``flag`` names.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BlockingIOError as error:
            os.close(fd)
            raise ValueError(
                f"another process is writing {held or path}: wait for it, or choose another {flag}"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # between opening and locking, another file has come in its place


@contextlib.contextmanager
def hold(lock: Path, held: str | Path, flag: str) -> Iterator[None]:
    """Keep what a run writes from being another run's output, too.

    Args:
        lock: a file that is there meanwhile.
        held: the output, which
        flag: names on the command line.

    Raises:
        ValueError: another process holds it, or the file cannot be written.
    """
    fd = None
    with one_line_errors(held):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = open_locked(lock, Path(held), flag)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            # some network file systems; what was opened is closed
            print(f"{held} cannot be locked here: let no other run write there.", file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            lock.unlink()  # while it is held: who waits for it sees that it is gone
        if fd is not None:
            os.close(fd)


def write_durably(fd: int, parts: Iterable[bytes]) -> None:
    """Write all parts, and return when they are on disk."""
    for part in parts:
        content = memoryview(part)
        while content:
            content = content[os.write(fd, content) :]
    os.fsync(fd)
