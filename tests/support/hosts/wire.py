"""A slow and lossy link between a host and the network, where the kernel has no netem.

`python wire.py HOST_END NETWORK_END DELAY_S LOSS SEED`: two TAP devices; a frame that is sent into one comes out of the
other after DELAY_S seconds, or with probability LOSS never. They are gone with this process.
"""

import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

_TUNSETIFF, _TAP, _NO_HEADER = 0x400454CA, 0x0002, 0x1000  # of linux/if_tun.h
_FRAME = 1 << 16


def tap(name: str) -> int:
    """A new TAP device: what the network stack sends into it can be read here, and the other way round."""
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP | _NO_HEADER))
    return handle


def forward(ends: tuple[int, int], delay_s: float, loss: float, draw: random.Random) -> None:
    """Pass frames on for ever. All wait equally long, so they leave in the order of their coming."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        ready, _, _ = select.select(ends, (), (), max(0.0, waiting[0][0] - time.monotonic()) if waiting else None)
        for end in ready:
            frame = os.read(end, _FRAME)
            if draw.random() >= loss:
                waiting.append((time.monotonic() + delay_s, other[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, frame = waiting.popleft()
            try:
                os.write(end, frame)
            except OSError:  # the device is down, or has no room: the frame is lost, as on any link
                continue


def main(host_end: str, network_end: str, delay_s: str, loss: str, seed: str) -> None:
    ends = tap(host_end), tap(network_end)
    print("ready", flush=True)
    forward(ends, float(delay_s), float(loss), random.Random(int(seed)))


if __name__ == "__main__":
    main(*sys.argv[1:])
