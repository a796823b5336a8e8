"""What this process may use: CPUs by affinity and by the quota of its control groups, memory by the machine and by their limit.

A container's limits are control groups. Their files are version 2's (one tree) or version 1's (a tree a controller); limits of the groups above
count too."""

import math
import os
from pathlib import Path, PurePosixPath

SYSTEM = Path("/")


def cpus(system: Path = SYSTEM) -> int:
    """CPUs that this process may use at once, at least 1."""
    allowed = len(os.sched_getaffinity(0))
    for folder in _groups(system, "cpu"):
        quota, period = _numbers(folder / "cpu.max", 2)
        if quota is None:
            (quota,), (period,) = _numbers(folder / "cpu.cfs_quota_us", 1), _numbers(folder / "cpu.cfs_period_us", 1)
        if quota is not None and period and quota > 0:
            allowed = min(allowed, math.ceil(quota / period))
    return max(1, allowed)


def memory_bytes(system: Path = SYSTEM) -> int:
    """Bytes of memory that this process may use."""
    allowed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _groups(system, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            (limit,) = _numbers(folder / name, 1)
            if limit is not None and limit > 0:
                allowed = min(allowed, limit)
    return allowed


def _groups(system: Path, controller: str) -> list[Path]:
    """Folders of this process's control groups that may limit it, with those above them."""
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "", "/")
        if controllers == "":
            root = system / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            root = system / "sys/fs/cgroup" / controllers
            root = root if root.is_dir() else system / "sys/fs/cgroup" / controller
        else:
            continue
        here = PurePosixPath(path.lstrip("/"))
        folders += [root / here, *(root / above for above in here.parents)]
    return folders


def _numbers(path: Path, count: int) -> list[int | None]:
    """The first whole numbers of a file; None for "max", and for all where there is no such file."""
    try:
        words = path.read_text().split()
    except OSError:
        words = []
    numbers = [int(word) if word.lstrip("-").isdigit() else None for word in words[:count]]
    return numbers + [None] * (count - len(numbers))
