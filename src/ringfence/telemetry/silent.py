"""`Meters` of a process that has none."""

from __future__ import annotations


class NoMeters:
    """Takes everything, keeps nothing."""

    def add(self, name: str, value: float = 1.0, **labels: str) -> None:
        """See Meters."""

    def put(self, name: str, value: float, **labels: str) -> None:
        """See Meters."""

    def drop(self, name: str, **labels: str) -> None:
        """See Meters."""

    def seen(self, name: str, value: float, **labels: str) -> None:
        """See Meters."""
