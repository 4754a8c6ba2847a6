"""Generates the protobuf code before setuptools looks for packages; see pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))
import generate_protos

# A source archive carries the generated code, and no .proto files.
if generate_protos.PROTO_ROOT.is_dir():
    generate_protos.generate()

setup()
