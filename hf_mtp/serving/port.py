"""Opens the port of a server before its model is loaded, so that a port in use is reported at once."""

import errno
import os
import socket


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening TCP socket.

    Args:
        host (`str`): Address to listen on.
        port (`int`): Port to listen on; 0 for any free one.

    Raises:
        OSError: The port is in use, or the address is not one of this machine.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"Cannot listen on port {port} of {host}: {_problem(error)}. {_advice(error)}") from error
    # asyncio does this for its own sockets only. Without, the end of a response waits 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _problem(error: OSError) -> str:
    """What went wrong, without the address that Python appends."""
    return error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)


def _advice(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "Choose another port with --port, or stop the process that uses it."
    if error.errno == errno.EACCES:
        return "Choose a port from 1024 on with --port."
    return "Pass an address of this machine with --host, such as 127.0.0.1, or 0.0.0.0 for all."


def url_of(listening: socket.socket) -> str:
    """The address of a listening socket, without a slash at the end."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
