"""Runs a command as a process of its own and measures it: time, memory, reads from disk.

    python measure.py cp -r FROM TO

It works on Linux only. What is measured:

* wall: from just before the process is started until it has ended.
* CPU: user and system time of the process and of all descendants that were waited for (wait4).
* private memory: RssAnon of /proc/PID/status, summed over the process and its descendants, the
  largest of samples taken every 20 ms. Pages of mapped files, which the kernel can drop and read
  again, are not in it, so tools that map their inputs and tools that read them compare fairly. A
  peak shorter than the interval can be missed.
* resident memory: ru_maxrss, the largest of one process, mapped files included. For information:
  it can be no smaller than the memory of the process that measures, so that is kept small.
* disk: bytes that had to come from the disk because the page cache did not hold them (ru_inblock).
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02
BLOCK = 512
CHUNK = 1 << 24
MIB = 1 << 20


@dataclass(frozen=True)
class Measurement:
    """What one run of a command took.

    Attributes:
        command: The command with its arguments.
        status: Its exit status; negative is the number of the signal that ended it.
        wall: Seconds from start to end.
        cpu: Seconds of user and system time.
        private: Most bytes of private memory of the process tree at one time.
        resident: Most bytes of resident memory of one of its processes.
        disk: Bytes read from the disk.
        samples: How many times the memory was looked at.
        output: What the command wrote, standard output and error together.
    """

    command: tuple[str, ...]
    status: int
    wall: float
    cpu: float
    private: int
    resident: int
    disk: int
    samples: int
    output: str


def measure(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    interval: float = INTERVAL,
) -> Measurement:
    """Runs a command to its end and measures it.

    Args:
        command: The program and its arguments.
        log: A file that takes the command's output.
        environment: Variables that are set in addition to this process's own.
        interval: Seconds between two looks at the memory.

    Returns:
        The measurements, whatever the exit status.

    Raises:
        OSError: The command could not be started, or /proc does not list children.
    """
    words = tuple(str(word) for word in command)
    if not Path("/proc/self/task", str(os.getpid()), "children").exists():
        raise OSError("this kernel has no /proc/PID/task/TID/children: memory cannot be measured")
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        sampler = _Sampler(process.pid, interval)
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    sampler.stop()
    process.returncode = os.waitstatus_to_exitcode(status)
    return Measurement(
        command=words,
        status=process.returncode,
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        private=sampler.peak,
        resident=usage.ru_maxrss * 1024,
        disk=usage.ru_inblock * BLOCK,
        samples=sampler.samples,
        output=log.read_text(errors="replace"),
    )


def checked(run: Measurement) -> Measurement:
    """The run, if it succeeded; ends this process with its output if not."""
    if run.status:
        sys.exit(f"error: {' '.join(run.command)}:\n{run.output}")
    return run


def private_memory(pid: int) -> int:
    """Sums the private memory of a process and its descendants.

    Args:
        pid: The process at the root of the tree.

    Returns:
        Bytes of RssAnon; what has ended meanwhile counts nothing.
    """
    total = 0
    waiting = [pid]
    while waiting:
        current = waiting.pop()
        try:
            total += _anonymous(current)
            waiting += _children(current)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def warm_cache(files: Sequence[Path]) -> float:
    """Reads files once, so that the page cache holds them if they fit.

    Returns:
        The seconds that it took.
    """
    start = time.perf_counter()
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


class _Sampler(threading.Thread):
    """Looks at the memory of a process tree until it is stopped."""

    def __init__(self, pid: int, interval: float) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.samples = 0
        self._pid = pid
        self._interval = interval
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.is_set():
            self.peak = max(self.peak, private_memory(self._pid))
            self.samples += 1
            self._ended.wait(self._interval)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def _anonymous(pid: int) -> int:
    _, found, rest = _read(f"/proc/{pid}/status").partition(b"RssAnon:")
    return int(rest.split(None, 1)[0]) * 1024 if found else 0  # not found: ended, not yet reaped


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 (see _read)
        try:
            found += map(int, _read(f"/proc/{pid}/task/{task}/children").split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _read(path: str) -> bytes:
    """Reads a file of /proc; several times cheaper than Path.read_text, and called so often."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, 1 << 16)
    finally:
        os.close(file)


def main() -> None:
    """Measures the command that follows and prints the figures."""
    if len(sys.argv) < 2:
        sys.exit("usage: measure.py COMMAND [ARGUMENT]...")
    log = Path(f"/tmp/measure-{os.getpid()}.log")
    taken = measure(sys.argv[1:], log)
    log.unlink()
    sys.stdout.write(taken.output)
    print(f"status {taken.status}, wall {taken.wall:.2f} s, CPU {taken.cpu:.2f} s")
    print(f"private {taken.private / 2**20:.0f} MiB, resident {taken.resident / 2**20:.0f} MiB")
    print(f"read from disk {taken.disk / 2**20:.0f} MiB; {taken.samples} samples")
    sys.exit(taken.status if taken.status >= 0 else 128 - taken.status)


if __name__ == "__main__":
    main()
