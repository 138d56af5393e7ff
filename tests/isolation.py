"""Moves the test process into a network of its own, where there is nothing but the loopback device.

Ray binds its ports on every interface whatever it is told, and no test should reach the internet. Needs root on Linux;
elsewhere tests run in the machine's network.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
import threading

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1


def enter_private_network() -> bool:
    """Leave the machine's network for good; return whether that worked.

    Threads that exist already would stay behind, so it must come first.
    """
    if not sys.platform.startswith("linux") or os.geteuid() or threading.active_count() > 1:
        return False
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
    return True


def is_private() -> bool:
    """Return whether this process was started in such a network."""
    return interfaces() == ["lo"]


def interfaces() -> list[str]:
    """Return the names of the network interfaces that this process sees."""
    return [name for _, name in socket.if_nameindex()]
