"""What the records of all benchmarks have in common."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def commit(*paths: str) -> str:
    """What is checked out, `-dirty` where the library or one of these paths differs from it.

    On a machine with a copy of the files alone: what the environment variable COMMIT says, or "unknown".
    """
    try:
        short = git("rev-parse", "--short=10", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return short + ("-dirty" if git("status", "--porcelain", "--", "cmim_plugin", *paths) else "")


def git(*command: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout.strip()
