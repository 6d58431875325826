"""How much memory the host can still give: the machine's, or what a container's limits leave."""

from __future__ import annotations

import os
from pathlib import Path


def host_bytes_available(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping; the least of what the machine and its cgroups say.

    Reads ``MemAvailable`` and the limits of cgroup v1 and v2, at every level. Pages of files that a group could give
    back count as available. None where nothing says (no Linux, no ``sysconf``). ``root``: for tests.
    """
    found = [*_machine(root / "proc/meminfo"), *_groups(root)]
    if not found and root == Path("/") and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    return min(found, default=None)


def check_host_bytes(needed: int, what: str, available: int | None) -> None:
    """Raise MemoryError unless the host can give ``needed`` bytes."""
    if available is not None and needed > available:
        raise MemoryError(
            f"offload: {needed:,} bytes of host memory needed for {what}, {available:,} available; lower max_len or "
            "batch_size, or raise the container's memory limit"
        )


def _machine(meminfo: Path) -> list[int]:
    if not meminfo.is_file():
        return []
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return [int(line.split()[1]) * 1024]
    return []


def _groups(root: Path) -> list[int]:
    """What each limited cgroup of this process has left."""
    listing = root / "proc/self/cgroup"
    if not listing.is_file():
        return []
    left: list[int] = []
    for line in listing.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        # In a container the path may be the host's, of which only the root is mounted
        for place in (folder, *folder.parents) if folder.is_dir() else (top,):
            left += _left(place, *names)
            if place == top:
                break
    return left


def _left(folder: Path, limit_name: str, used_name: str, reclaimable_name: str) -> list[int]:
    limit, used, stat = (folder / name for name in (limit_name, used_name, "memory.stat"))
    if not (limit.is_file() and used.is_file()) or not (text := limit.read_text().strip()).isdigit():
        return []
    reclaimable = 0
    if stat.is_file():
        for line in stat.read_text().splitlines():
            name, value = line.split()[:2]
            if name == reclaimable_name:
                reclaimable = int(value)
    return [max(0, int(text) - int(used.read_text()) + reclaimable)]
