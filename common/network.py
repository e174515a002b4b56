"""By which of its network interfaces a machine reaches the others of a run.

gloo takes the one that the machine's own name leads to. On Debian and Ubuntu that is loopback, 127.0.1.1, and in many
containers the name leads nowhere: processes of several machines would not find each other.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys
from contextlib import suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

_SIOCGIFADDR = 0x8915  # of Linux: an interface's IPv4 address


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
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                told = fcntl.ioctl(asking, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(told[20:24]) == address:
                    return name
    return None
