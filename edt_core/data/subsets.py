"""Parts of numbered rows, without randomness: the share of a rank, and rows at even distances."""


def share(total: int, rank: int, world_size: int) -> slice:
    """The part of `total` rows that belongs to a rank: contiguous parts whose sizes differ by at most one row."""
    return slice(rank * total // world_size, (rank + 1) * total // world_size)


def joint_share(total: int, ranks: range, world_size: int) -> slice:
    """The part of `total` rows that belongs to some ranks that follow one another."""
    return slice(share(total, ranks[0], world_size).start, share(total, ranks[-1], world_size).stop)


def at_even_distances(row: int, total: int, limit: int) -> bool:
    """Whether a row of 0..total-1 is one of `limit` rows at even distances; always true if `total` <= `limit`."""
    count = min(limit, total)
    return (row + 1) * count // total > row * count // total
