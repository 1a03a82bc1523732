"""How many rows a product is filled up to: few numbers, since each of them costs the CPU's library a kernel."""

LEAST = 6  # rows of a packed product: no more take longer than one does (benchmarks/small_products.py)
PLAIN_LEAST = 4  # of a plain one: with fewer, sums are made in another order


def bucket(rows: int, least: int = LEAST) -> int:
    """The number of rows that `rows` are filled up to, `least` or more.

    oneDNN compiles and keeps a kernel, of about a megabyte, for every number of rows and shape of weights it meets.
    """
    if rows <= least:
        return least
    for most, step in ((16, 4), (64, 8), (256, 32)):
        if rows <= most:
            return -(-rows // step) * step
    return -(-rows // 64) * 64
