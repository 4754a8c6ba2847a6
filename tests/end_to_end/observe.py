"""What tests see of a server from outside: Prometheus' samples, and conditions that come true."""

import re
import time

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Samples:
    """One reading of /metrics."""

    def __init__(self, server):
        self._samples = []
        for line in server.metrics().splitlines():
            found = _SAMPLE.match(line)
            if found:
                labels = dict(_LABEL.findall(found["labels"] or ""))
                self._samples.append((found["name"], labels, float(found["value"])))

    @property
    def names(self):
        return {name for name, _, _ in self._samples}

    def total(self, name, **labels):
        """The sum over all series of this name that have these labels."""
        return sum(
            value
            for sample, own, value in self._samples
            if sample == name and labels.items() <= own.items()
        )


def wait_until(condition, timeout=30.0):
    """Asks the server until it says so; every question is a round trip, so nothing spins."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"


def session_prefixes(client):
    """Of all open sessions; those of other tests may expire, so a later set can lack some."""
    return {session.id_prefix for session in client.list_sessions()}
