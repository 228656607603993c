"""Experts of an MoE layer in Triton, in the design that fused MoE kernels in Triton share.

Each expert's slots are padded to whole tiles. The first product gathers its rows, a kernel of its own applies the activation, the second product scales
by the weight of the choice, and a sum over the choices of a token follows. Weights are [E, N, K].
"""

import triton
import triton.language as tl


@triton.jit
def product_kernel(a, b, out, weights, slot_of_row, expert_of_tile, rows_used, n, depth, slots,
                   SLOTS_A_ROW: tl.constexpr, WEIGHTED: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """out[slot] = a[slot // SLOTS_A_ROW] @ b[expert].T, times weights[slot] if WEIGHTED; a tile's rows are slots of one expert.

    GROUP tiles one above the other share columns of the weight before the next columns are begun.
    """
    block = tl.program_id(0)
    columns = tl.cdiv(n, BN)
    tiles = tl.cdiv(tl.load(rows_used), BM)
    first = block // (GROUP * columns) * GROUP
    if first >= tiles:
        return
    height = tl.minimum(tiles - first, GROUP)
    inside = block % (GROUP * columns)
    tile, column = first + inside % height, inside // height
    if column >= columns:
        return
    slot = tl.load(slot_of_row + tile * BM + tl.arange(0, BM))
    real = slot < slots  # padding is the number of slots
    expert = tl.load(expert_of_tile + tile).to(tl.int64)
    col = column * BN + tl.arange(0, BN)
    step = tl.arange(0, BK)
    a_at = a + (slot // SLOTS_A_ROW).to(tl.int64)[:, None] * depth + step[None, :]
    b_at = b + expert * n * depth + (col % n).to(tl.int64)[None, :] * depth + step[:, None]
    sums = tl.zeros((BM, BN), tl.float32)
    for k in range(0, depth, BK):
        left = tl.load(a_at, mask=real[:, None] & (step[None, :] < depth - k), other=0.0)
        right = tl.load(b_at, mask=step[:, None] < depth - k, other=0.0)
        sums = tl.dot(left, right, sums)
        a_at += BK
        b_at += BK
    if WEIGHTED:
        sums *= tl.load(weights + slot, mask=real, other=0.0)[:, None]
    out_at = out + slot.to(tl.int64)[:, None] * n + col[None, :]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=real[:, None] & (col[None, :] < n))


@triton.jit
def silu_kernel(both, out, width, BLOCK: tl.constexpr):
    """out [S, I] = silu(gate) * up of both [S, 2I]; a program for BLOCK columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    gate = tl.load(both + row * 2 * width + col, mask=live, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + row * width + col, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=live)


@triton.jit
def sum_kernel(rows, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, H]: the sum of a token's TOP_K rows [T * TOP_K, H]; a program for BLOCK columns of a token."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = col < width
    sums = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        sums += tl.load(rows + (token * TOP_K + choice) * width + col, mask=live, other=0.0).to(tl.float32)
    tl.store(out + token * width + col, sums.to(out.dtype.element_ty), mask=live)
