"""Two hosts on one machine: network namespaces joined by a cable, else two loopback addresses."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """What reaches a host.

    Attributes:
        prefix: words before a command that is to run there.
        address: of the host, which the other one sees.
        interface: that has it.
    """

    prefix: tuple[str, ...]
    address: str
    interface: str


LOOPBACK = [Host((), f"127.0.0.{number}", "lo") for number in (2, 3)]


def _ip(words: str) -> bool:
    done = subprocess.run(["ip", *words.split()], capture_output=True, timeout=30)
    return done.returncode == 0


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Make two hosts, in namespaces of the network where this machine allows that."""
    names = [f"xk{os.getpid()}{end}" for end in "ab"]
    if shutil.which("ip") is None:
        yield LOOPBACK
        return
    try:
        yield _joined(names) or LOOPBACK
    finally:
        for name in names:
            _ip(f"netns del {name}")  # its end of the cable goes with it


def _joined(names: list[str]) -> list[Host] | None:
    hosts = [Host(("ip", "netns", "exec", n), f"10.213.7.{i + 1}", n) for i, n in enumerate(names)]
    one, other = names
    steps = [f"netns add {name}" for name in names]
    steps.append(f"link add {one} netns {one} type veth peer name {other} netns {other}")
    for host in hosts:
        inside = f"-n {host.interface}"
        steps.append(f"{inside} addr add {host.address}/24 dev {host.interface}")
        steps += [f"{inside} link set {link} up" for link in ("lo", host.interface)]
    return hosts if all(map(_ip, steps)) else None
