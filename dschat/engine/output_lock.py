"""One run at a time in an output directory."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from dschat.errors import UserError

LOCK = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # by some network file systems


def lock_output_dir(output_dir: str) -> TextIO | None:
    """The lock is held until the file is closed or the process ends, however it ends. None: locks are not supported.

    Raises:
        UserError: another process holds it.
    """
    path = Path(output_dir) / LOCK
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            file.close()
            return None
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"{output_dir}: {holder} is at work there; wait for it, stop it, or choose another --output_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
