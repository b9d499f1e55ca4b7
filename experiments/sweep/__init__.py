"""Sweeps: curves of a metric over a size, for several arms, each of many short runs. They know no task."""
