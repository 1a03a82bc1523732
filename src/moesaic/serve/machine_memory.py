"""How much memory this machine could give: the system, the process's control group, an accelerator; without torch."""

from pathlib import Path

from moesaic.errors import MoesaicError


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that could be taken now: the system's, or what the process's group may still take, whichever is less.

    Raises MoesaicError where nobody says; then a budget has to be given.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        raise MoesaicError(
            "this system does not say how much memory is available: give a budget, such as 8GiB"
        ) from None
    return max(0, min([free, *_group_limits(root)]))


def device_bytes(device: str) -> int:
    """Memory of an accelerator that could be taken now. Raises MoesaicError where nobody says."""
    import torch  # here alone: plans for main memory need none

    try:
        where = torch.device(device)
        if where.type == "cuda":
            return int(torch.cuda.mem_get_info(where)[0])
    except (RuntimeError, AssertionError) as error:
        raise MoesaicError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    raise MoesaicError(f"device {device!r} does not say how much memory it has: give a budget, such as --memory 8GiB")


def _group_limits(root: Path) -> list[int]:
    """What each control group that the process is in, and those around it, leave; groups without limit say nothing."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        controllers, path = line.split(":", 2)[1:] if line.count(":") >= 2 else ("none", "")
        if controllers == "":
            mount, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inner = mount / path.lstrip("/")
        # In a container the path may be the host's: then only the mount's top is there.
        for folder in (inner, *(parent for parent in inner.parents if mount == parent or mount in parent.parents)):
            try:
                left.append(int((folder / limit).read_text()) - int((folder / usage).read_text()) + _cached(folder))
            except (OSError, ValueError):  # no such folder, or "max"
                continue
    return left


def _cached(folder: Path) -> int:
    """Bytes of files that the group keeps in memory and would give back."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        found = {name: int(count) for name, count in (line.split() for line in lines)}
    except (OSError, ValueError):
        return 0
    return found.get("total_inactive_file", found.get("inactive_file", 0))
