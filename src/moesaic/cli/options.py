"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="Model folder or hub name; [bold]pocket[/bold] is the one that ships along.")
]
Domains = Annotated[
    list[str] | None,
    typer.Option(
        "--domains",
        "-d",
        help="A domain: an installed kind of text (python, c, prose, readme, licence, arithmetic), name=path (txt, "
        "jsonl, folder) or name=hf:dataset. Repeat it, or separate with commas. Default: the six installed kinds.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the refactored checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
MaxBytes = Annotated[int, typer.Option(help="Text taken per domain, bytes.")]
Dtype = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Experts = Annotated[
    str | None, typer.Option(help="Bytes for experts, or a share of them: 4GiB, 0.5. Default: what the rest leaves.")
]
MaxRequests = Annotated[int, typer.Option(help="Requests that run at a time.")]
MaxTokens = Annotated[int, typer.Option(help="Tokens of one step; longer prompts run in chunks.")]
Device = Annotated[str | None, typer.Option(help="An accelerator that computes and that --memory is of, such as cuda.")]
HostMemory = Annotated[
    str | None, typer.Option(help="Main memory for experts that --device does not hold. Default: what is available.")
]
Calibration = Annotated[
    Path | None, typer.Option(help="What moesaic bench wrote: routes in that model, at the seconds measured there.")
]
PageCache = Annotated[
    str, typer.Option(help="With --calibration: experts come from the page cache (keep) or the disk (drop).")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def model_source(model: str) -> str:
    """`pocket` means the packaged model; anything else is taken as it is."""
    if model != "pocket":
        return model
    from moesaic.pocket import pocket_path

    return str(pocket_path())


def domain_specs(domains: list[str] | None) -> list[str] | None:
    """Flatten repeated and comma-separated --domains."""
    return [spec for item in domains for spec in item.split(",") if spec] if domains else None


def keep_value(keep: str) -> float | list[float]:
    """`0.5`, or one value per layer: `0.5,0.6,...`."""
    from moesaic.errors import MoesaicError

    try:
        values = [float(part) for part in keep.split(",")]
    except ValueError:
        raise MoesaicError(f"--keep {keep!r} is no number and no comma-separated list of numbers in (0, 1]") from None
    return values[0] if len(values) == 1 else values
