"""`scripts/bench selector`: what `auto` chooses, held against the fastest implementation."""
