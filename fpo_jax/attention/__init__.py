"""Causal attention for every decoder, and the choice of its implementation.

dot_product   `attend`: one call whatever runs below it
dispatch      which implementation runs, and why
blockwise     XLA, block by block; splash (TPU) and mosaic (Hopper GPUs) call Pallas kernels
segment_mask, block_mask  the attention mask of packed sequences, by token and by block
sharded       each device attends its own sequences and heads
"""

from fpo_jax.attention.dispatch import IMPLEMENTATIONS, MAX_MASKED, Selection, keeps_results, select
from fpo_jax.attention.dot_product import attend

__all__ = ["IMPLEMENTATIONS", "MAX_MASKED", "Selection", "attend", "keeps_results", "select"]
