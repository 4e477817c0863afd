"""How the N x V plane of logits is cut into blocks, and whether it is kept from the forward to the backward pass.

In: sizes on one device, the bytes that a logit takes, the options of the head. Out: `Blocks`. Nothing is computed here.

Letters beyond `spec.py`: W rows of a head block, M tokens of a token block.
"""

from typing import NamedTuple

from fpo_jax.kernels.lm_head import spec as specs

LANES = 128  # block sizes are multiples of the widest vector unit's row
MAX_TOKEN_BLOCK = 65536  # above it, blocks of the head become too thin for a matrix unit


class Blocks(NamedTuple):
    """How the N x V plane of logits is cut, on one device."""

    tokens: int  # rows of hidden per block
    vocab: int  # rows of the head per block
    token_count: int  # blocks of tokens
    vocab_count: int  # blocks of the head
    workspace_bytes: int  # what is held of one block's logits


def plan_blocks(tokens: int, head_rows: int, logit_bytes: int, *, spec: specs.HeadSpec) -> Blocks:
    """Choose the largest blocks whose logits fit in `spec.workspace_bytes`, evenly cut.

        workspace = tokens * vocab_block * logit_bytes

    Blocks of the head are multiples of 128 rows, at least 128; more than 128 rows are cut in two at least, so that no
    [N, V] array exists however small the problem (`kept_tiles` is the exception). Tokens are cut only above 65,536, or
    where even 128 rows exceed the budget.

    Args:
        tokens: on one device.
        head_rows: on one device, without padding.
        logit_bytes: held per logit.
        spec: `workspace_bytes` and `vocab_block` are read.

    Returns:
        Blocks; the last block of either axis may overlap the one before.

    >>> plan_blocks(8192, 128256, 6, spec=specs.HeadSpec(workspace_bytes=256 * 2**20))
    Blocks(tokens=8192, vocab=5376, token_count=1, vocab_count=24, workspace_bytes=264241152)
    """
    limit = spec.workspace_bytes // (min(spec.vocab_block or LANES, head_rows) * logit_bytes)
    token_count = _ceil_div(tokens, max(1, min(MAX_TOKEN_BLOCK, limit)))
    rows = _ceil_div(tokens, token_count)
    if spec.vocab_block is not None:
        block = spec.vocab_block
    else:
        largest = max(LANES, spec.workspace_bytes // (rows * logit_bytes) // LANES * LANES)
        count = max(2, _ceil_div(head_rows, largest))
        block = _ceil_div(_ceil_div(head_rows, count), LANES) * LANES
    block = min(block, head_rows)
    return Blocks(rows, block, token_count, _ceil_div(head_rows, block), rows * block * logit_bytes)


def kept_tiles(tokens: int, head_rows: int, held: int, *, limit: int, spec: specs.HeadSpec) -> Blocks | None:
    """Plan one block whose logits stay from the forward pass to the backward pass; None where they do not.

    They stay where `held` is at most `limit`, but where `spec.vocab_block` asks for more blocks. A forward pass without
    a gradient keeps nothing and goes by `plan_blocks`.

    Args:
        tokens: rows of hidden on one device.
        head_rows: on one device, with padding, as one block is the head as it is.
        held: bytes, of the logits and what the backward pass holds beside them.
        limit: bytes.
        spec: `vocab_block` is read.

    >>> kept_tiles(512, 32000, 512 * 32000 * 8, limit=192 * 2**20, spec=specs.HeadSpec())
    Blocks(tokens=512, vocab=32000, token_count=1, vocab_count=1, workspace_bytes=131072000)
    """
    if held > limit or (spec.vocab_block or head_rows) < head_rows:
        return None
    return Blocks(tokens, head_rows, 1, 1, held)


def whole(tokens: int, head_rows: int, *_, **__) -> Blocks:
    """Return the plan of one block, for kernels that cut the plane themselves and hold none of it."""
    return Blocks(tokens, head_rows, 1, 1, 0)


def _ceil_div(numerator, denominator):
    """Quotient of two positive integers, rounded up."""
    return -(-numerator // denominator)
