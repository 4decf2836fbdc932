"""Addresses under which the hosts of a job reach each other, without a name service."""

import contextlib
import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # ioctl: address of a network interface


def list_own_addresses() -> list[str]:
    """Return the IPv4 addresses of this host's interfaces but the loopback's."""
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                addresses.append(socket.inet_ntoa(reply[20:24]))
    return [address for address in addresses if not address.startswith("127.")]
