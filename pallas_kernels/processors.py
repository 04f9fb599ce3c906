"""How many processors this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def count(root: Path = Path("/")) -> int:
    """Those that it is bound to, or fewer where a control group of Linux (a container's limit) grants it less time.

    root: of the file system in which Linux tells of control groups.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(math.ceil(share) for share in _granted(root))]))


def _granted(root: Path) -> Iterator[float]:
    """Processors' worth of time: of the process' groups and those around them, of both versions of control groups."""
    top = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        # In a container the path may be the host's, and the container's own group stands at the top.
        groups = [Path(*Path(path).parts[1:n]) for n in range(1, len(Path(path).parts) + 1)]
        for group in groups:
            if not controllers:
                numbers = _read(top / group / "cpu.max").split()
            elif "cpu" in controllers.split(","):
                folder = top / controllers / group
                numbers = [*_read(folder / "cpu.cfs_quota_us").split(), *_read(folder / "cpu.cfs_period_us").split()]
            else:
                continue
            if len(numbers) == 2 and all(number.isdecimal() and int(number) for number in numbers):  # not "max", not -1
                yield int(numbers[0]) / int(numbers[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
