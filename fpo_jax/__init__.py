"""f-PO: preference alignment by f-divergence minimisation, in JAX/Flax for TPUs and GPUs (arXiv 2410.21662)."""

__version__ = "0.1.0"
