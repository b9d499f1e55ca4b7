"""The frame of every experiment: the command line, training, checkpoints. It knows no task and no model."""
