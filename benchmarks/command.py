"""What benchmarks do at their end: run, show tables, write the record, and say in a line what was wrong."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moesaic.errors import MoesaicError
from moesaic.files import atomic_write_json

Record = dict[str, Any]


def command(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Console], Record],
    tables: Callable[[Record], Iterable[Table]],
) -> None:
    """args: among them `threads`, and `out`, a file or None."""
    console = Console()
    torch.set_num_threads(args.threads)
    try:
        record = run(args, console)
    except MoesaicError as error:
        sys.exit(f"error: {error}")
    for table in tables(record):
        console.print(table)
    if args.out:
        atomic_write_json(args.out, record)
