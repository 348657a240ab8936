"""The processes of one run, as torchrun or a launcher starts them: each has a rank and its share of the tasks.

The usual variables of the environment say who they are: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. A run
of one process needs none of them. Rank 0 alone writes files and speaks.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from mlframework.errors import FailedRun, UserError

if TYPE_CHECKING:  # a single process waits for none of it
    from torch import Tensor

__all__ = [
    *("RankFailed", "agreed", "count", "gathered", "is_started", "joined", "leads", "local_rank", "one_speaks"),
    *("rank", "share", "sum_on", "summed", "tell"),
]

T = TypeVar("T")

#: How a rank ended that had no time to say why.
SILENTLY = "ended without a word"

#: Seconds that ranks look for the one that ended, that a rank waits for rank 0 to tell the same error, and that rank 0
#: stays at most for ranks that still ask.
SEARCH, PATIENCE, LEAVE = 5.0, 2.0, 20.0

#: How often a rank that waits for the others looks whether one of them has said why the run ends.
LOOK = timedelta(seconds=1)

#: How long a rank waits for one that compiles or evaluates; one that ended is noticed at once.
LONGEST = timedelta(days=1)


class Member(NamedTuple):
    """Where a rank runs."""

    host: str
    pid: int


class Group:
    """The processes of this run, once they have joined."""

    #: None in a run of one process.
    current: ClassVar[Group | None] = None

    def __init__(self, rank: int, count: int, store: Any) -> None:
        self.rank, self.count, self.store = rank, count, store
        self.members: list[Member] = []
        self.sums: Any = None  # the process group in which tensors are summed; None: the one of the CPU


class RankFailed(FailedRun):
    """Another rank ended while this one waited for it."""

    @property
    def silent(self) -> bool:
        """Whether the rank had no error of its own: it was killed, and the run can go on."""
        return SILENTLY in str(self)


def is_started() -> bool:
    """Whether torchrun or a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def count() -> int:
    """The number of processes."""
    return 1 if Group.current is None else Group.current.count


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if Group.current is None else Group.current.rank


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


def leads() -> bool:
    """Whether this process writes the files of the run and speaks on the screen."""
    return rank() == 0


def share(tasks: int) -> slice:
    """The tasks of this rank, of so many; the ranks' numbers differ by one at most."""
    return slice(tasks * rank() // count(), tasks * (rank() + 1) // count())


@contextmanager
def joined() -> Iterator[None]:
    """Joins the other processes, if there are any."""
    if not is_started() or Group.current is not None:
        yield
        return
    Group.current = connected()
    try:
        yield
        gathered(None)  # rank 0, in whose process the store may be, leaves with the others
    finally:
        leave()


@contextmanager
def one_speaks() -> Iterator[None]:
    """Within this context all ranks but 0 are silent; only `tell` is heard."""
    if is_started():  # when a rank ends, torch's store prints a page in each of the others
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not is_started() or os.environ.get("RANK", "0") == "0":
        yield
        return
    nowhere = open(os.devnull, "w")  # noqa: SIM115 - it stays open for the log handlers that are made within
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def connected() -> Group:
    """The group of this process's environment."""
    import torch.distributed as dist

    # The defaults of its functions are the group that is there at its import. Imported later, by the compiler, it would
    # keep the group for ever: its connections open, and its threads alive when Python ends, which may then abort.
    import torch.distributed.nn.functional  # noqa: F401

    try:
        store, rank, count = next(iter(dist.rendezvous("env://", timeout=timedelta(minutes=5))))
    except (ValueError, KeyError) as error:
        why = f"cannot be joined ({error}): start them by torchrun, or by a launcher"
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}: the other processes {why}") from error
    # torchrun may keep its store when it starts the ranks again; what the earlier ones left there leads to the dead.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    of_group, group = dist.PrefixStore("group", store), Group(rank, count, dist.PrefixStore("told", store))
    try:
        dist.init_process_group("gloo", store=of_group, rank=rank, world_size=count, timeout=LONGEST)
        group.members = [Member(*each) for each in everywhere((socket.gethostname(), os.getpid()), count)]
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise FailedRun(f"the {count} processes cannot be joined: one of them ended at its start ({said})") from error
    return group


def everywhere(value: Any, count: int) -> list[Any]:
    import torch.distributed as dist

    found: list[Any] = [None] * count
    dist.all_gather_object(found, value)
    return found


def waited(group: Group, work: Any) -> None:
    """Waits for the other ranks in a call of gloo, until one of them says why the run ends.

    It says so in the store: torch may leave the connections of a rank that has ended its part open.
    """
    while True:
        with suppress(RuntimeError):  # of a call that takes longer, or that failed
            work.wait(LOOK)
        if work.is_completed():
            work.wait()
            return
        if reason(group):
            raise RuntimeError("another rank has ended")


def all_there(group: Group) -> None:
    """Waits until all ranks have come here."""
    import torch.distributed as dist

    waited(group, dist.barrier(async_op=True))


def sum_on(device: Any) -> None:
    """Lets tensors of a device be summed by the fastest means: nccl where each rank has a GPU of its own."""
    group = Group.current
    if group is None or device.type != "cuda":
        return
    import torch
    import torch.distributed as dist

    own = gathered(str(torch.cuda.get_device_properties(device).uuid))
    group.sums = dist.new_group(backend="nccl" if len(set(own)) == group.count else "gloo", timeout=LONGEST)


def summed(tensor: Tensor) -> Tensor:
    """A tensor summed over all ranks, in place."""
    group = Group.current
    if group is not None:
        import torch.distributed as dist

        with naming_the_lost():
            if dist.get_backend(group.sums) == "gloo":
                waited(group, dist.all_reduce(tensor, group=group.sums, async_op=True))
            else:
                dist.all_reduce(tensor, group=group.sums)
    return tensor


def gathered(value: T) -> list[T]:
    """The values of all ranks, by rank, in every rank."""
    if Group.current is None:
        return [value]
    with naming_the_lost():
        all_there(Group.current)
        return everywhere(value, Group.current.count)


def agreed(function: Callable[[], T]) -> T:
    """What a function gives in rank 0, in every rank. If it fails there, the others end as well."""
    if Group.current is None:
        return function()
    import torch.distributed as dist

    found = [function() if leads() else None]
    with naming_the_lost():
        all_there(Group.current)
        dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Turns the failure of a call in which ranks wait for each other into the name of the rank that ended."""
    try:
        yield
    except RuntimeError as error:  # torch has no narrower class for all its backends
        assert Group.current is not None
        raise RankFailed(lost(Group.current, error)) from error


def lost(group: Group, error: Exception) -> str:
    """A line that names the rank that ended: it said so itself, or its process is gone."""
    end = time.monotonic() + SEARCH
    host = group.members[group.rank].host
    while time.monotonic() < end:
        with suppress(RuntimeError):  # the store may have been in the rank that ended
            if said := reason(group):
                return said
        for number, (where, pid) in enumerate(group.members):
            if where == host and is_gone(pid):
                return first(group, f"rank {number} (process {pid} on {where}) was killed, or {SILENTLY}")
        time.sleep(0.05)
    said = str(error).partition("\n")[0]
    return first(group, f"a rank {SILENTLY}, on another machine than {host} ({said})")


def reason(group: Group) -> str:
    """The error by which the first rank ended; empty while none has."""
    return group.store.compare_set("first", "", "").decode()


def first(group: Group, line: str) -> str:
    """The error by which the first rank ended: this line, if no other rank was faster."""
    with suppress(RuntimeError):
        return group.store.compare_set("first", "", line).decode()
    return line


def is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, whether or not its parent has taken note."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def tell(line: str, *, lost: bool) -> None:
    """Prints the line of an error on stderr. Of several ranks one prints it, and the rank stands before its own.

    Args:
        lost: whether the error is that of another rank.
    """
    group = Group.current
    if group is None:
        print(line, file=sys.stderr, flush=True)
        return
    with suppress(RuntimeError):  # without a store a rank cannot know whether another has spoken
        line = about_another(group, line) if lost else about_itself(group, line)
    if line:
        print(line, file=sys.stderr if leads() else sys.__stderr__, flush=True)
    with suppress(RuntimeError):
        group.store.set(f"heard by {group.rank}", "")
    leave()  # the others fail now, and ask the store why
    if leads() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # the store is in this process
        wait_for_others(group)


def about_another(group: Group, line: str) -> str:
    """The line that a rank prints about the end of another; empty if somebody has told it."""
    is_first = group.store.add("lost", 1) == 1
    return line if is_first and not group.store.check(["known"]) else ""


def about_itself(group: Group, line: str) -> str:
    """The line that a rank prints about its own error; empty if rank 0 has the same error, and prints that."""
    if group.rank == 0:
        group.store.set("of rank 0", line)
    elif of_rank_0(group) == line:
        return ""
    else:
        line = f"rank {group.rank} ({group.members[group.rank].host}): {line}"
    first(group, line)
    with suppress(RuntimeError):
        group.store.set("known", "")
    return line


def wait_for_others(group: Group) -> None:
    """Until the other ranks know why the run ends, or have ended; but not for ever."""
    host, end = group.members[group.rank].host, time.monotonic() + LEAVE
    left = set(range(group.count)) - {group.rank}
    while left and time.monotonic() < end:
        gone = {n for n in left if group.members[n].host == host and is_gone(group.members[n].pid)}
        left -= gone | {n for n in left if group.store.check([f"heard by {n}"])}
        time.sleep(0.05)


def of_rank_0(group: Group) -> str:
    """The error of rank 0, if it has one soon."""
    with suppress(RuntimeError):
        group.store.wait(["of rank 0"], timedelta(seconds=PATIENCE))
        return group.store.get("of rank 0").decode()
    return ""
