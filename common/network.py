"""By which of its network interfaces a machine reaches the others of a run.

gloo takes the one that the machine's own name leads to. On Debian and Ubuntu that is loopback, 127.0.1.1, and in many
containers the name leads nowhere: processes of several machines would not find each other.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from array import array
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_SIOCGIFCONF = 0x8912  # of Linux: all IPv4 addresses
_NAME, _ADDRESS, _LENGTH = slice(16), slice(20, 24), 40  # in its struct ifreq, with 64 bits


def interface_to_others(store: Store, rank: int, size: int, master: str) -> str | None:
    """The name of the interface to the other machines; None if there are none, or it cannot be told (no Linux, IPv6).

    All processes call it. Those on the master's machine may know it by loopback only: they look the other way.
    """
    mine = _address_towards(master)
    store.set(f"address of {rank}", mine)
    if _is_near(mine):
        addresses = (store.get(f"address of {other}").decode() for other in range(size))
        far = next((address for address in addresses if not _is_near(address)), None)
        mine = _address_towards(far) if far else ""
    return None if _is_near(mine) else _interface_of(mine)


def _address_towards(host: str) -> str:
    """This machine's IPv4 address on the way to `host`, "" if there is no way. Nothing is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((host, 9))
        return asking.getsockname()[0]
    return ""


def _is_near(address: str) -> bool:
    return not address or ip_address(address).is_loopback


def _interface_of(address: str) -> str | None:
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return None
    table = array("B", bytes(1000 * _LENGTH))
    start, room = table.buffer_info()
    length = 0
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        length, _ = struct.unpack("iL", fcntl.ioctl(asking, _SIOCGIFCONF, struct.pack("iL", room, start)))
    for row in (table[place : place + _LENGTH].tobytes() for place in range(0, length, _LENGTH)):
        if socket.inet_ntoa(row[_ADDRESS]) == address:
            return row[_NAME].split(b"\0")[0].decode().split(":")[0]  # eth0:1 is another address of eth0
    return None
