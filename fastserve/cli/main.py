"""Entry point of `fastserve`: the verbs and their order. Imports nothing heavy; each verb imports what it needs."""

from __future__ import annotations

from typing import Annotated

import typer

from fastserve import __version__
from fastserve.cli import (
    bench,
    chat,
    compress,
    data,
    evaluate,
    finetune,
    generate,
    info,
    pretrain,
    serve,
    tokenizer,
    tune,
)
from fastserve.cli.options import GroupedCommand, guarded

app = typer.Typer(
    name="fastserve",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, compress, serve, explain and operate transformer language models.",
    epilog="Example: fastserve serve",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fastserve {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for function, example in (
    (serve.serve, "fastserve serve ./my-model --port 9000 --max-model-len 4096"),
    (chat.chat, "fastserve chat ./my-model, or: fastserve chat --url http://127.0.0.1:8000"),
    (generate.generate, 'fastserve generate -p "Once upon a time" --max-tokens 50 --temperature 0'),
    (info.info, "fastserve info ./my-model --json"),
    (pretrain.pretrain, "fastserve pretrain configs/bert.toml --out runs/bert --nproc 2"),
    (finetune.finetune, "fastserve finetune classification ./bert --data intents.csv --out runs/intents --epochs 3"),
    (tune.tune, "fastserve tune configs/tales.toml --out runs/search --trials 20"),
    (compress.compress, "fastserve compress ./my-model --out ./my-model-int4 --method gptq --calibration stories.txt"),
):
    app.command(cls=GroupedCommand, epilog=f"Example: {example}")(guarded(function))
app.command("eval", cls=GroupedCommand, epilog="Example: fastserve eval runs/bert/model --corpus held_out.txt")(
    guarded(evaluate.evaluate)
)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(tokenizer.app, name="tokenizer")


def main() -> None:
    """Run the command line; ends the process with its exit status."""
    app(prog_name="fastserve")


if __name__ == "__main__":
    main()
