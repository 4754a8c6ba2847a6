"""A worker process: one system, asked and answering by JSON lines on standard input and output.

`python -m kernelbench.worker SYSTEM THREADS`. Ends when its input does.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from .systems.system import System, Unsupported


def _answer(system: System, request: dict[str, Any]) -> dict[str, Any]:
    op = request.pop("op")
    if op not in (
        "describe",
        "prepare",
        "run",
        "output",
        "release",
        "limit",
        "long_document",
        "recovery",
    ):
        raise ValueError(f"no operation {op}")
    return getattr(system, op)(**request) or {}


def main() -> None:
    # Libraries print: what is standard output to them goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    name, threads = sys.argv[1], int(sys.argv[2])
    try:
        system = importlib.import_module(f".systems.{name}", __package__).create(threads)
    except (ImportError, OSError, Unsupported) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        try:
            reply = _answer(system, json.loads(line))
        except Unsupported as error:
            reply = {"error": str(error), "unsupported": True}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500], "unsupported": False}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
