"""`allmend depth export`: a paired model as a GGUF file for llama.cpp."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape


def export(
    folder: Annotated[Path, typer.Argument(help="A folder of `allmend depth apply`.")],
    out: Annotated[Path, typer.Option(help="The GGUF file.")],
    kind: Annotated[str, typer.Option(help="float16 or float32, of the matrices.")] = "float16",
) -> None:
    """Write a paired model as GGUF, which llama.cpp reads as `deci`: a Llama with widths for each layer.

    For example:  allmend depth export paired --out paired.gguf
    """
    from allmend.depth.gguf_export import export_gguf
    from allmend.errors import UserError

    if kind not in ("float16", "float32"):
        raise UserError(f"{kind!r} is none of float16 and float32", where="--kind")
    export_gguf(folder, out, kind="float16" if kind == "float16" else "float32")
    Console().print(
        f"Written to {escape(str(out))}: {out.stat().st_size / 1e6:,.0f} MB", highlight=False, soft_wrap=True
    )
