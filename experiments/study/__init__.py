"""Studies: arms × seeds of one config, run as `fit` runs, and compared with intervals. They know no task."""
