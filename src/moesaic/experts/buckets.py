"""How many rows a product is filled up to: few numbers, since each of them costs the CPU's library a kernel."""


def bucket(rows: int) -> int:
    """The number of rows that `rows` are filled up to.

    oneDNN compiles and keeps a kernel, of about a megabyte, for every number of rows and shape of weights it meets.
    """
    for most, step in ((2, 1), (16, 4), (64, 8), (256, 32)):
        if rows <= most:
            return -(-rows // step) * step
    return -(-rows // 64) * 64
