"""What every HTTP server here begins and ends with: a socket of its own, its address, and an orderly end."""

import signal
import socket

from dschat.errors import UserError

import uvicorn


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: nobody can listen there.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        mend = "stop what listens there, or give another --port (0: a free one) or --host"
        raise UserError(f"--host {host} --port {port}: {error.strerror}; {mend}") from None


def address(listener: socket.socket) -> str:
    """The URL for those who ask: with this machine's name where it listens on every interface."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def serve(app: "uvicorn._types.ASGIApplication", listener: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM; what is being answered then is finished first."""
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # uvicorn raises them again at its end; the default would be fatal
    server.run(sockets=[listener])
