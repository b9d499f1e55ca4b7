"""Running a cell's step over time."""

from multint.scan.loop import scan

__all__ = ["scan"]
