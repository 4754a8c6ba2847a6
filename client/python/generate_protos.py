#!/usr/bin/env python3
"""Generates attnd/_proto from the repository's .proto files, by grpcio-tools.

The generated modules import each other below attnd._proto, so that the package takes no other name.
Quick when nothing has changed: a stamp over the inputs is compared before grpcio-tools is imported.
"""

import hashlib
import importlib.metadata
import re
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROTO_ROOT = HERE.parents[1] / "proto"
PACKAGE = "attnd._proto"
TARGET = HERE / "attnd" / "_proto"
STAMP = TARGET / ".stamp"
SOURCES = ("attention/v1/types.proto", "attention/v1/attention.proto", "attention/v1/admin.proto")


def _wanted_stamp() -> str:
    digest = hashlib.sha256(importlib.metadata.version("grpcio-tools").encode())
    for path in (Path(__file__), *(PROTO_ROOT / source for source in SOURCES)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _below_package(text: str) -> str:
    return re.sub(
        r"^from attention\.v1 import", f"from {PACKAGE}.attention.v1 import", text, flags=re.M
    )


def generate() -> bool:
    """Generates what is out of date; returns whether anything was."""
    wanted = _wanted_stamp()
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return False
    from grpc_tools import protoc  # slow to import

    with tempfile.TemporaryDirectory() as made:
        arguments = [
            f"-I{PROTO_ROOT}",
            f"--python_out={made}",
            f"--pyi_out={made}",
            f"--grpc_python_out={made}",
        ]
        if protoc.main(["protoc", *arguments, *SOURCES]) != 0:
            raise SystemExit("generate_protos: protoc failed")
        shutil.rmtree(TARGET, ignore_errors=True)
        for source in sorted(Path(made).rglob("*.py*")):
            target = TARGET / source.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_below_package(source.read_text()))
    for folder in (TARGET, TARGET / "attention", TARGET / "attention" / "v1"):
        (folder / "__init__.py").write_text("")
    STAMP.write_text(wanted)
    return True


if __name__ == "__main__":
    if generate():
        print(f"generated {TARGET.relative_to(HERE)}", file=sys.stderr)
