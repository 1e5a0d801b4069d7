"""HOST:PORT texts, and the rule that nothing listens beyond loopback without TLS by accident."""

import ipaddress

from baton.common.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; IPv6 hosts stand in brackets. Raises ConfigError."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or int(port) > 65535 or not host:
        raise ConfigError(f"{address!r} is no HOST:PORT address")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_loopback(host: str, *, insecure: bool) -> None:
    """Raises ConfigError for an address beyond loopback, unless the operator insists."""
    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"{host} is reachable from other machines and Baton speaks no TLS yet: "
            "listen on 127.0.0.1, or pass --insecure on a private network"
        )
