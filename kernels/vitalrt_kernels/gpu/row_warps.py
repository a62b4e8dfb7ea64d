def row_warps(block: int, most: int) -> int:
    """How many warps sum a row of `block` numbers: none that has the same ones as another.

    Such a warp would write the same sum in the same place, and its last bit may differ, as products are fused into sums
    in one half of a pair of lanes only: which of them stays would be chance.
    """
    return max(1, min(most, block // 32))
