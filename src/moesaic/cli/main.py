"""`moesaic`: the command line. Errors users can mend are one red line and exit code 2; bugs keep their traceback."""

import os
import sys

import typer

from moesaic.cli import (
    advise_commands,
    bench_command,
    claims_commands,
    inspect_commands,
    plan_commands,
    refactor_commands,
    replay_commands,
    serve_commands,
    simulate_commands,
    trace_commands,
    train_commands,
    tune_command,
)
from moesaic.errors import MoesaicError

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended; typer turns the interrupt into it

# Our own progress bars say what takes time; transformers' would only break the one clear line of an error.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    name="moesaic",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn a dense language model into a mixture of experts whose routes are known before the backbone runs.",
    epilog="Start with [bold]moesaic demo[/bold]: it refactors a small model that ships with the package, in minutes, "
    "offline.",
)
refactor_commands.add_to(app)
inspect_commands.add_to(app)
claims_commands.add_to(app)
advise_commands.add_to(app)
train_commands.add_to(app)
simulate_commands.add_to(app)
trace_commands.add_to(app)
plan_commands.add_to(app)
bench_command.add_to(app)
tune_command.add_to(app)
serve_commands.add_to(app)
replay_commands.add_to(app)


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except MoesaicError as error:
        # one line, also where a library's message of many lines is quoted
        typer.secho(f"error: {' '.join(str(error).split())}", fg="red", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != INTERRUPTED:
            raise
        typer.secho("interrupted; the same command continues where it stopped", fg="yellow", err=True)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
