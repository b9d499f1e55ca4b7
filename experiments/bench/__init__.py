"""The benchmark of the scan engines: `python -m experiments bench`."""
