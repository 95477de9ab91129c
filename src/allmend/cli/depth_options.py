"""Options that several commands of `allmend depth` have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(help="A folder, a Hub name, a GGUF file; RUN or RUN:ARM; with --merge also a PEFT folder."),
]

Calibration = Annotated[
    Path | None,
    typer.Option(help="Text to measure on (.txt, .jsonl, …, also .gz); the built-in clinical terms if absent."),
]

Merge = Annotated[bool, typer.Option("--merge", help="MODEL is an adapter: merge it into its base first.")]

Device = Annotated[str, typer.Option(help="cpu, cuda or mps; the first that is there if absent.")]
