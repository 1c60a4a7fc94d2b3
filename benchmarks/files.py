"""Files of a pair of checkpoints, PAIR/base and PAIR/tuned. Imports no torch."""

import json
from pathlib import Path
from typing import Any

SIDES = ("base", "tuned")


def weight_files(directory: Path) -> list[Path]:
    """Lists the safetensors files of both checkpoints, in a fixed order."""
    return [path for side in SIDES for path in sorted((directory / side).glob("*.safetensors"))]


def fingerprint(directory: Path) -> dict[str, list[int]]:
    """Tells whether the weights of a pair may have changed: size and time of every file."""
    return {
        str(path.relative_to(directory)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in weight_files(directory)
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is either the old or the new one, never a part of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
