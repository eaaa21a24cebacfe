"""The folder of the data cache is its user's alone: others neither read what is in it nor put anything there."""

import os
from pathlib import Path

from dschat.errors import UserError

ENTRIES = {"generator", "reference_logprobs"}


def open_cache(folder: str) -> None:
    """Make the folder, or take the rights of others from one that is there.

    Raises:
        UserError: it cannot be made, is another user's, or is no cache and open to others: their rights stay then.
    """
    mend = "give a folder of its own as --data_output_path"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        stat = os.stat(folder)
        if stat.st_uid != os.geteuid():
            raise UserError(f"{folder}: the data cache belongs to another user, who could change your data; {mend}")
        if stat.st_mode & 0o077:
            foreign = [entry.name for entry in Path(folder).iterdir() if not _is_ours(entry.name)]
            if foreign:
                raise UserError(f"{folder} is open to other users and more than a data cache ({foreign[0]}); {mend}")
            os.chmod(folder, 0o700)
    except OSError as error:
        raise UserError(f"{folder}: the data cache cannot be opened ({error.strerror}); {mend}") from None


def _is_ours(name: str) -> bool:
    return name in ENTRIES or (name.startswith("_") and name.endswith(".lock"))  # the locks of `datasets`
