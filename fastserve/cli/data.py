"""`fastserve data`: from raw files to clean text and token shards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, GroupedCommand, guarded, with_options
from fastserve.core.config import format_bytes
from fastserve.train.data.settings import PrepareSettings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Prepare text for training.",
    epilog="Example: fastserve data prepare ./corpus --out ./prepared --languages en",
)


@app.callback()
def data() -> None:
    pass


@with_options((PrepareSettings, "Rules"))
def prepare(
    options: dict[str, Any],
    inputs: Annotated[
        list[str],
        typer.Argument(help="Files and folders (.txt, .jsonl, .parquet, .html, .md, each also .gz), or hub:NAME."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the result; the same again goes on with it.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer or model folder: pack token shards too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    config: ConfigFile = None,
) -> None:
    """Clean, deduplicate, split and pack text.

    Writes OUT/text (JSON lines), OUT/tokens (with --tokenizer) and OUT/report.html. A run that was stopped goes on when
    it is started again.
    """
    from fastserve.cli.progress import StageBars
    from fastserve.train.data import prepare as data

    settings = _settings(options, config)
    with StageBars() as bars:
        report = data.prepare(inputs, out, settings, tokenizer, bars.update)
    if as_json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(
        f"{report['documents_in']:,} documents ({format_bytes(report['bytes_in'])}) in, "
        f"{report['documents_out']:,} ({format_bytes(report['bytes_out'])}) out"
    )
    for rule, count in report["dropped_documents"].items():
        print(f"  {rule:24} {count:>10,} dropped ({format_bytes(report['dropped_bytes'][rule])})")
    for split, tokens in report.get("tokens", {}).items():
        print(f"  {split:24} {tokens:>10,} tokens")
    print(f"report: {out / 'report.html'}", file=sys.stderr)


def _settings(options: dict[str, Any], config: Path | None) -> PrepareSettings:
    from fastserve.train.recipe import build_section, read_toml

    values = read_toml(config) if config is not None else {}
    return build_section(PrepareSettings, {**values, **options}, "")


app.command(
    cls=GroupedCommand,
    epilog="Example: fastserve data prepare ./corpus hub:owner/texts --out ./prepared --against eval.jsonl",
)(guarded(prepare))
