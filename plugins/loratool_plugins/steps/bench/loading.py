"""What it takes to load a model, measured in a process that does nothing else.

    python -m loratool_plugins.steps.bench.loading GRAPH PROVIDER THREADS

Private memory is RssAnon of /proc/PID/status: pages of mapped files, which the kernel can drop and
read again, are not in it. Where there is no /proc, memory is not measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from loratool.errors import InputError
from loratool.quiet import shorten
from loratool_plugins.steps.bench.sessions import Options, open_session, providers_of

_INTERVAL = 0.005  # seconds between two looks at the memory


@dataclass(frozen=True)
class Load:
    """What one load took.

    Attributes:
        seconds: until the session was there.
        private: bytes of private memory more than before, once it was there; None: not measured.
        peak: the most of them meanwhile.
        providers: that the session really has.
    """

    seconds: float
    private: int | None
    peak: int | None
    providers: tuple[str, ...]


def measure_load(path: Path, options: Options) -> Load:
    """Load a graph in a process of its own.

    Raises:
        InputError: it cannot be loaded.
    """
    words = [sys.executable, "-m", __name__, str(path), options.provider, str(options.threads)]
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    peak: int | None = None
    try:
        while process.poll() is None:
            found = private_memory(str(process.pid))
            peak = found if peak is None else max(peak, found or 0)
            time.sleep(_INTERVAL)
        out, err = process.communicate()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines()
        ended = f"its process ended with {process.returncode}"
        raise InputError(f"{path}: cannot be loaded: {lines[-1] if lines else ended}")
    told = json.loads(out)
    before, after, providers = told["before"], told["after"], tuple(told["providers"])
    if before is None or after is None:
        return Load(told["seconds"], None, None, providers)
    return Load(told["seconds"], after - before, max(peak or 0, after) - before, providers)


def private_memory(process: str = "self") -> int | None:
    """Bytes of private memory of a process; None where that cannot be told."""
    try:
        text = Path("/proc", process, "status").read_text()
    except OSError:
        return None
    _, found, rest = text.partition("RssAnon:")
    return int(rest.split(None, 1)[0]) * 1024 if found else None


def main() -> None:
    """Load the graph that the arguments name, and print what it took as JSON."""
    path, provider, threads = sys.argv[1:]
    before = private_memory()
    started = time.perf_counter()
    try:
        session = open_session(Path(path), Options(provider, int(threads)))
    except InputError as error:
        sys.exit(shorten(error))
    seconds = time.perf_counter() - started
    after = private_memory()
    told = {"before": before, "after": after, "providers": providers_of(session)}
    print(json.dumps({"seconds": seconds, **told}))


if __name__ == "__main__":
    main()
