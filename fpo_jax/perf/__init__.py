"""FLOPs of a model (flops), traces and timings of a run (profiler), accelerators by name (hardware)."""
