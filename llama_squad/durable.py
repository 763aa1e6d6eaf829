"""Files that are locked and written durably, and whose errors are one line with the cure."""

import contextlib
import errno
import os
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


def open_locked(path: Path) -> int:
    """Open a file for appending, made where there is none, and lock it.

    Raises:
        ValueError: another process has the lock.
    """
    import fcntl  # here, so that Windows can at least summarise

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
                f"another process is writing {path}: wait for it, or choose another --output"
            ) from error
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # between opening and locking, another file has come in its place


def write_durably(fd: int, parts: Iterable[bytes]) -> None:
    """Write all parts, and return when they are on disk."""
    for part in parts:
        content = memoryview(part)
        while content:
            content = content[os.write(fd, content) :]
    os.fsync(fd)
