"""`fastserve tokenizer`: learn a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, GroupedCommand, guarded, with_options
from fastserve.train.tokenizer import TokenizerSettings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Learn a tokenizer.",
    epilog="Example: fastserve tokenizer train ./prepared --out ./tokenizer --vocab-size 8000 --chat",
)


@app.callback()
def tokenizer() -> None:
    pass


@with_options((TokenizerSettings, "Tokenizer"))
def train(
    options: dict[str, Any],
    inputs: Annotated[list[str], typer.Argument(help="Prepared folders, or raw files and folders of text.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    text_key: Annotated[str, typer.Option(help="Key of the text in raw JSON lines and Parquet files.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    config: ConfigFile = None,
) -> None:
    """Learn a byte-level BPE, WordPiece or Unigram tokenizer.

    The folder opens with transformers; its report says how well the vocabulary fits texts kept from learning.
    """
    from fastserve.train.recipe import build_section, read_toml
    from fastserve.train.tokenizer import make_tokenizer_folder, texts_of

    values = read_toml(config) if config is not None else {}
    settings = build_section(TokenizerSettings, {**values, **options}, "")
    report = make_tokenizer_folder(texts_of(inputs, text_key), out, settings)
    if as_json:
        print(json.dumps(report))
        return
    print(f"{out}: {report['kind']}, {report['vocab_size']:,} tokens")
    for name in ("tokens_per_word", "bytes_per_token", "unknown_share", "exact_round_trips", "vocabulary_used"):
        print(f"  {name.replace('_', ' '):20} {report[name]}")


app.command(
    cls=GroupedCommand,
    epilog="Example: fastserve tokenizer train ./prepared --out ./tokenizer --vocab-size 8000 --chat",
)(guarded(train))
