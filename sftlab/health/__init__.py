"""Whether a machine can train: one function per thing that a run needs, each answering ok or what to do."""
