"""Connections of a process are found, and reset on both ends without its doing."""

import os
import socket
import subprocess
import sys

import pytest
from support import tcp_sockets

# Connects to the port that it is given, says so, and waits for the end of the connection.
CHILD = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    print("connected", flush=True)
    try:
        connection.recv(1)
    except ConnectionError as error:
        print(type(error).__name__, flush=True)
"""


def test_the_connections_of_two_processes_are_found_and_reset() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(port)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        connection, (_, remote) = server.accept()
        with child, connection:
            assert child.stdout.readline() == "connected\n"
            found = tcp_sockets.between(child.pid, os.getpid())
            assert found == {(remote, port)}
            assert tcp_sockets.between(os.getpid(), child.pid) == {(port, remote)}
            if not tcp_sockets.reset(found):
                child.kill()
                pytest.skip("this machine resets no connections of others")
            assert child.stdout.readline().startswith("Connection")
            with pytest.raises(ConnectionError):
                connection.recv(1)
