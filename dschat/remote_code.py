"""Whether Python code that comes with a model may run here: never, unless the user gave --trust_remote_code."""

from dschat.errors import UserError

_trusted = False


def trust(yes: bool) -> None:
    """For all models and tokenizers that this process loads from now on. `parse_config` calls it with the flag."""
    global _trusted
    _trusted = yes


def is_trusted() -> bool:
    return _trusted


def refuse_if_asked_for(path: str, error: Exception) -> None:
    """
    Raises:
        UserError: ``error``, which a library raised over the model at ``path``, says that it needs code of its own.
    """
    if "trust_remote_code" in str(error):
        raise UserError(
            f"{path} brings Python code of its own, which would run with your rights; read it, then give "
            "--trust_remote_code"
        ) from None
