"""How a program ends: a user's mistake is one line and exit code 2, anything else a traceback and exit code 1."""

import atexit
import errno
import gc
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

# Called before a crash is reported: one that is only the consequence of another process's end ends this one instead.
before_crash: list[Callable[[], None]] = []

AGAIN = "start again: "  # what $DSCHAT_ERROR_FILE begins with after a `StartAgain`


class UserError(Exception):
    """A mistake in what the user gave us. The message is one line: what, where (file:line of data), how to mend it."""


class Stopped(Exception):
    """A signal ended the run in good order. The message, empty on ranks other than 0, says how to go on."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class StartAgain(Exception):
    """The run cannot go on in this process; the same command goes on with it. The message is one line."""


def run_program(main: Callable[[], None]) -> NoReturn:
    """Run ``main`` and exit: 0 done, 2 for a `UserError` or a full disk (one line on stderr), 75 for `StartAgain`,
    128 + signal for `Stopped`, 1 for everything else.

    What has been imported by now stays to the end: the collector of cycles need not look through it again and again,
    nor when the interpreter ends, which with torch and transformers takes a second.

    When $DSCHAT_ERROR_FILE is set (e2e_rlhf.py does), the first process to fail also writes its error there, so that
    the cause can be shown last, after whatever a launcher prints.
    """
    gc.freeze()
    gc.enable()
    _run(main)
    _leave(0)


def run_before_imports(part: Callable[[], object]) -> None:
    """Run what need not wait for a program's imports: help, mistakes in flags. It exits as `run_program` says, or the
    program goes on; then the collector of cycles pauses until `run_program`, a sixth of the imports' time saved.
    """
    _run(part)
    gc.disable()


def _run(part: Callable[[], object]) -> None:
    try:
        part()
    except UserError as error:
        _leave_with_line(str(error))
    except StartAgain as reason:
        _record(f"{AGAIN}{reason}")
        print(str(reason), file=sys.stderr, flush=True)
        _leave(os.EX_TEMPFAIL)
    except Stopped as stop:
        if str(stop):
            _record(str(stop))
            print(str(stop), file=sys.stderr, flush=True)
        _leave(128 + stop.signal_number)
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr, flush=True)
        _leave(130)
    except Exception as error:
        if _disk_is_full(error):
            _leave_with_line(f"{error}; free some room: the same command then goes on from what was saved before")
        text = traceback.format_exc()
        for look in before_crash:
            look()
        _record(text)
        print(text, file=sys.stderr, flush=True)
        _leave(1)


def end_process(message: str) -> NoReturn:
    """Report ``message``, one line, and end this process with exit code 1 at once, whatever its threads are doing."""
    _record(message)
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def _disk_is_full(error: Exception) -> bool:
    """Libraries that write files from native code (safetensors) pass the system's reason on as text only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return (isinstance(error, OSError) and error.errno in full) or any(os.strerror(e) in str(error) for e in full)


def _leave_with_line(message: str) -> NoReturn:
    _record(f"error: {message}")
    print(f"error: {message}", file=sys.stderr, flush=True)
    _leave(2)


def _leave(code: int) -> NoReturn:
    """Exit. One of several ranks leaves out the end of the interpreter, after everything registered for it: a thread
    of gloo that lets go of its last tensor meanwhile would abort the process (at ZeRO 3 on a CPU one in eight)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _record(text: str) -> None:
    path = os.environ.get("DSCHAT_ERROR_FILE")
    if not path:
        return
    try:
        with open(path, "x", encoding="utf-8") as file:  # "x": the first failing rank is the cause, later ones follow
            file.write(text)
    except OSError:
        pass  # the terminal has it all the same
