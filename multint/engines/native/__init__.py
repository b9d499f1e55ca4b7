"""Loops as C++: one function for each direction of a schedule, made and compiled at its first use."""
