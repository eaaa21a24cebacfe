"""The directory of an adapter: what tells it from that of a whole model, and what it stands on."""

import json
from pathlib import Path
from typing import Any

from dschat.engine.run_identity import weights_key
from dschat.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's
BASE_RECORD = "base_weights.json"  # the `weights_key` of the model under an adapter


def adapter_base(path: str) -> str | None:
    """The directory or hub name of the model that the adapter in ``path`` was trained on; None: no adapter is there.

    Raises:
        UserError: the adapter's configuration is damaged, or that directory is no longer there.
    """
    where = Path(path)
    if not (where / ADAPTER_CONFIG).is_file() or (where / "config.json").is_file():
        return None
    base = adapter_config(path).get("base_model_name_or_path") or ""
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise UserError(
            f"{path} is a LoRA adapter on {base or 'a model that it does not name'}, which is not there; put it back, "
            f"or correct base_model_name_or_path in {where / ADAPTER_CONFIG}"
        )
    return base


def adapter_config(path: str) -> dict[str, Any]:
    file = Path(path) / ADAPTER_CONFIG
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({' '.join(str(error).split())[:200]}); restore it or train the adapter again"
        ) from None


def record_base(directory: str, base: str) -> None:
    """Beside an adapter on ``base``: which weights those were, if any are here."""
    file, key = Path(directory) / BASE_RECORD, weights_key(base)
    if key is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(json.dumps({"weights_sha256": key}) + "\n", encoding="utf-8")


def require_same_base(path: str) -> None:
    """The model that the adapter in ``path`` names is the one that it was trained on, by what `record_base` wrote.

    Nothing is said of an adapter without a record (another program's, or on a hub name that was not in the local
    cache), nor where the model is not here: then the adapter is put on a copy of it, which the caller names.

    Raises:
        UserError: the weights there were changed in place; the record is damaged.
    """
    file, base = Path(path) / BASE_RECORD, adapter_config(path).get("base_model_name_or_path") or ""
    now = weights_key(base) if base and file.is_file() else None
    if now is None:
        return
    try:
        then = json.loads(file.read_text(encoding="utf-8"))["weights_sha256"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file} is damaged ({' '.join(repr(error).split())[:200]}); restore or delete it") from None
    if now != then:
        raise UserError(
            f"{path} is a LoRA adapter on {base}, whose weights are no longer those that it was trained on; put them "
            f"back, name a copy of them as base_model_name_or_path in {Path(path) / ADAPTER_CONFIG}, or train the "
            f"adapter again (the same weights in other files: delete {BASE_RECORD})"
        )


def refuse_other_kind(directory: str, is_adapter: bool) -> None:
    """
    Raises:
        UserError: a whole model is where an adapter is to be saved, or an adapter where a whole model is.
    """
    other = Path(directory) / ("config.json" if is_adapter else ADAPTER_CONFIG)
    if other.exists():
        raise UserError(f"{other}: a model of another kind is here; choose another --output_dir, or empty it")
