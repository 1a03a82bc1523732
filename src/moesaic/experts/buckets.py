"""How many rows a product is filled up to: few numbers, since each of them costs the CPU's library a kernel."""


def bucket(rows: int) -> int:
    """The number of rows that `rows` are filled up to.

    oneDNN compiles and keeps a kernel, of about a megabyte, for every number of rows and shape of weights it meets.
    Four rows take no longer than one: packed products are up to 1.3 times as fast (benchmarks/ffn_paths.py).
    """
    for most, step in ((16, 4), (64, 8), (256, 32)):
        if rows <= most:
            return -(-rows // step) * step
    return -(-rows // 64) * 64
