"""Opens the port of a server before its model is loaded, so that a port in use is reported at once."""

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
        raise OSError(
            f"Cannot listen on port {port} of {host}: {os.strerror(error.errno)}. Choose another port with --port, "
            "or stop the process that uses it."
        ) from error
    # asyncio does this for its own sockets only. Without, the end of a response waits 40 ms for an acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def url_of(listening: socket.socket) -> str:
    """The address of a listening socket, without a slash at the end."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
