"""Training: inputs and schedule of a run, its jitted steps, and the loop with what it calls."""
