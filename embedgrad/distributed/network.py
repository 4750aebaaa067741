"""The network interface over which the processes reach each other."""

from __future__ import annotations

import contextlib
import socket
import struct

_NOWHERE = ("192.0.2.1", 9)  # an address that no machine has (RFC 5737): asks for the route to the outside


def interface_to(address: str, port: int, beyond: bool) -> str | None:
    """The name of the interface that leads to `address`; None where it cannot be told.

    Gloo asks for the machine's own name instead, which many machines resolve to a loopback address that others cannot
    reach. beyond: some processes are on other machines, so a loopback interface would not do.
    """
    for target in ((address, port), _NOWHERE):
        own = _address_towards(target)
        if own is None or (beyond and own.startswith("127.")):
            continue
        for _, name in socket.if_nameindex():
            if _address_of(name) == own:
                return name
    return None


def _address_towards(target: tuple[str, int]) -> str | None:
    """This machine's IPv4 address on the way to `target`. A datagram socket sends nothing when it is connected."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _address_of(interface: str) -> str | None:
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            ask_for_address = 0x8915  # SIOCGIFADDR
            answer = fcntl.ioctl(probe.fileno(), ask_for_address, struct.pack("256s", interface.encode()[:15]))
            return socket.inet_ntoa(answer[20:24])
    return None
