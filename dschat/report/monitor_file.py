"""The alarms of step 3's monitor on the disk: alarms.json, a list of {"step", "kind", "text"}."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dschat.errors import UserError
from dschat.report.metrics import write_whole

ALARMS_FILE = "alarms.json"


def write_alarms(directory: Path, alarms: Sequence[dict[str, Any]]) -> None:
    write_whole(directory / ALARMS_FILE, json.dumps(list(alarms), indent=1, ensure_ascii=False) + "\n")


def read_alarms(directory: Path) -> list[dict[str, Any]]:
    """Those of a run; none where it had no monitor.

    Raises:
        UserError: the file is damaged.
    """
    path = directory / ALARMS_FILE
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from None
