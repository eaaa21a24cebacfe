"""Answers from one model to whoever asks, at any time: a thread that steps all of them together."""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from dschat.errors import UserError
from inference.lanes import Lanes, Request

import torch

Emit = Callable[[int | None | Exception], None]  # a token; None: that was all; an error: nothing more comes
_PAUSE = 0.2  # seconds without work after which it makes itself ready for other numbers of answers
_SMALL_WEIGHTS = 2**27  # bytes up to which one core decodes faster than several do together


class TooManyWaiting(UserError):
    """The queue is full; try again later."""


class Ticket:
    """One request of a `Decoder`. `cancel` may be called from any thread and more than once."""

    def __init__(self, request: Request, emit: Emit):
        self.request, self.emit, self.cancelled = request, emit, False

    def cancel(self) -> None:
        self.cancelled = True


class Decoder:
    """Decodes requests of one model in the order in which they come, up to ``lanes.size`` at once.

    All that touches the model happens in one thread. ``emit`` is called there too, so it must be quick.

    Args:
        eos_token_id: ends an answer; it is emitted.
        max_waiting: requests that may wait for a place; more are refused.
    """

    def __init__(self, lanes: Lanes, eos_token_id: int, max_waiting: int, weights_size: int = 0):
        self.lanes, self.eos_token_id, self.max_waiting = lanes, eos_token_id, max_waiting
        self._waiting: deque[Ticket] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._active: dict[Request, Ticket] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._single = weights_size <= _SMALL_WEIGHTS and not torch.cuda.is_available()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside of torch at the interpreter's end would abort the process

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """
        Raises:
            TooManyWaiting: as many wait already as may.
        """
        ticket = Ticket(request, emit)
        with self._changed:
            if len(self._waiting) >= self.max_waiting + self.lanes.size - len(self._active):
                raise TooManyWaiting(f"{len(self._waiting)} requests are waiting already")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def call(self, function: Callable[[], Any]) -> Future:
        """Run something else that uses the model, between two steps."""
        future: Future = Future()
        with self._changed:
            self._jobs.append((function, future))
            self._changed.notify()
        return future

    @property
    def load(self) -> tuple[int, int]:
        """(answers that are being decoded, requests that wait)."""
        return len(self._active), len(self._waiting)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def prepare(self, seconds: float) -> None:
        """Make ready for other numbers of answers now, for about so long; the rest in idle moments."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.call(self._prepare).result():
            pass

    def _run(self) -> None:
        if self._single:
            torch.set_num_threads(1)  # of this thread: a step's matrices are too small to be worth splitting
        more = True
        while not self._closed:
            with self._changed:
                if not self._busy:
                    self._changed.wait(_PAUSE if more else None)
                rest = not (self._busy or self._closed)
            if rest:
                more = more and self._prepare()
                continue
            self._work()
            self._admit()
            if self._active:
                self._step()

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._jobs or self._active)

    def _work(self) -> None:
        while self._jobs:
            function, future = self._jobs.popleft()
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def _admit(self) -> None:
        with self._changed:
            given_up = [ticket for ticket in self._waiting if ticket.cancelled]
            for ticket in given_up:
                self._waiting.remove(ticket)
        for ticket in given_up:
            ticket.emit(None)
        while self._waiting and len(self._active) < self.lanes.size:
            ticket = self._waiting.popleft()
            try:
                self.lanes.begin(ticket.request)
            except Exception as error:
                ticket.emit(error)
            else:
                self._active[ticket.request] = ticket

    def _step(self) -> None:
        for request, ticket in list(self._active.items()):
            if ticket.cancelled:
                self._finish(request, None)
        try:
            drawn = self.lanes.step()
        except Exception as error:  # nobody's answer can be trusted after that
            for request in list(self._active):
                self._finish(request, error)
            return
        for request, token, _ in drawn:
            self._active[request].emit(token)
            if token == self.eos_token_id or request.num_tokens == request.sampling.max_new_tokens:
                self._finish(request, None)

    def _finish(self, request: Request, last: Exception | None) -> None:
        ticket = self._active.pop(request)
        self.lanes.end(request)
        ticket.emit(last)

    def _prepare(self) -> bool:
        try:
            return self.lanes.prepare()
        except Exception:
            return False  # it will be met again, and told, by the request that needs it
