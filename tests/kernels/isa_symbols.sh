#!/usr/bin/env bash
# Fails on any symbol of the given objects that the linker may choose for the whole program (weak, vague, unique): code
# compiled for one instruction set would then run on CPUs that do not have it.
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "usage: isa_symbols.sh OBJECT..." >&2
  exit 2
fi
status=0
for object in "$@"; do
  symbols=$(nm --demangle "$object")
  if ! grep -q ' [DR] attn::kernels::[a-z0-9_]*::kUnit' <<<"$symbols"; then
    echo "$object: exports no unit of attn::kernels" >&2
    status=1
  fi
  if shared=$(grep -E '^[0-9a-f ]+ [WwVvu] ' <<<"$symbols"); then
    echo "$object:" >&2
    echo "$shared" >&2
    status=1
  fi
done
exit "$status"
