# ruff: noqa: RUF001 - texts in Chinese, and with curly quotes
from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.data import prepare as preparation
from fastserve.train.data.cleaning import clean, language_of, repair, scrub_personal
from fastserve.train.data.duplicates import near_duplicates
from fastserve.train.data.hashing import sequence_hashes, signature, word_hashes
from fastserve.train.data.prepare import prepare
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.data.shards import TokenDataset, split_texts
from fastserve.train.data.sources import Part, find_parts, plain_html, plain_markdown, read_documents
from fastserve.train.tokenizer import texts_of
from tests.folders import write_tokenizer
from tests.unit.train.data.planted import planted_corpus, sentences, words_of

OPEN = PrepareSettings(quality=False, min_words=1, near_duplicates=False, validation_share=0.0, workers=1)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def prepared(out: Path, source: Path, settings: PrepareSettings) -> list[str]:
    prepare([str(source)], out, settings)
    return list(split_texts(out, "train"))


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    planted = planted_corpus()
    settings = PrepareSettings(quality=False, validation_share=0.0, workers=1)
    kept = set(prepared(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", planted.texts), settings))
    dropped = {index for index, text in enumerate(planted.texts) if repair(text) not in kept}
    hits = len(dropped & planted.copies)
    assert hits / len(dropped) > 0.95 and hits / len(planted.copies) > 0.95


def test_every_planted_leak_is_found_and_nothing_else(tmp_path: Path) -> None:
    chooser = random.Random(3)
    texts = [sentences(words_of(chooser, 200)) for _ in range(60)]
    questions = [" ".join(words_of(chooser, chooser.choice((6, 12, 30)))) for _ in range(20)]
    chinese = "床前明月光疑是地上霜举头望明月低头思故乡"
    leaking = [
        f"{text}\n{question.upper()}!\n{text[:100]}" for text, question in zip(texts[:20], questions, strict=True)
    ]
    leaking.append("有一首诗。床前明月光，疑是地上霜。举头望明月，低头思故乡。")
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(
        "".join(json.dumps({"question": text, "id": 3}) + "\n" for text in [*questions, chinese]), encoding="utf-8"
    )
    settings = PrepareSettings(quality=False, against=(str(evaluation),), validation_share=0.0, workers=1)
    kept = prepared(tmp_path / "out", write_jsonl(tmp_path / "in.jsonl", leaking + texts[20:]), settings)
    assert kept == [repair(text) for text in texts[20:]]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["dropped_documents"] == {"leak": 21}


def test_a_signature_estimates_the_share_of_common_sequences() -> None:
    chooser = random.Random(5)
    words = words_of(chooser, 600)
    for share in (0.2, 0.5, 0.8, 0.95):
        other = words[: int(600 * share)] + words_of(chooser, 600 - int(600 * share))
        left, right = (word_hashes(" ".join(item)) for item in (words, other))
        first, second = (set(sequence_hashes(item, 3).tolist()) for item in (left, right))
        true = len(first & second) / len(first | second)
        assert abs((signature(left) == signature(right)).mean() - true) < 0.15


def test_words_are_hashed_without_case_marks_and_spaces() -> None:
    assert word_hashes("The fox -- and the BEAR!").tolist() == word_hashes("the  fox and, the bear").tolist()
    assert len(word_hashes("床前明月光, moon 2")) == 7
    assert len(word_hashes("...")) == 0
    assert word_hashes("ab ba").tolist()[0] != word_hashes("ab ba").tolist()[1]
    assert len(np.unique(word_hashes(" ".join(f"word{number}" for number in range(20_000))))) == 20_000


def test_a_group_keeps_its_first_document() -> None:
    rows = np.stack(
        [signature(word_hashes(text)) for text in ("a b c d e f", "x y z u v w", "a b c d e f", "a b c d e f")]
    )
    assert near_duplicates(rows, np.arange(4), 0.7).tolist() == [0, 1, 0, 0]
    assert near_duplicates(rows, np.array([1, 2, 3]), 0.7).tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "empty"),
        ("!!! ---", "empty"),
        ("too few words", "too short"),
        ("# ... # ... # ... # ... " * 5 + "some more words that stand here for their number only", "symbols"),
        ("- one item\n- two items\n- three items\n- four items of a list", "list"),
        ("1234 " * 9 + "and two words", "words without letters"),
        ("The same line again and again.\n" * 8 + "Another line.", "repeated lines"),
        ("buy now and save more money today " * 20, "repeated phrases"),
        ("See the first part of this line ...\nSee the second ...\nAnd see the third line of it ...", "symbols"),
        ("A quiet little story of a fox who lived by the sea and went home in the evening.", ""),
        ("从前有一只狐狸住在森林里，它每天早上都到河边去喝水。", ""),
    ],
)
def test_rules(text: str, rule: str) -> None:
    assert clean(text, PrepareSettings()).dropped_by == rule


def test_languages() -> None:
    assert language_of("从前有一只狐狸住在森林里，它每天早上都到河边去喝水。") == "zh"
    assert language_of("Once upon a time there was a fox who lived in the forest with her children.") == "en"
    german = "Es war einmal ein Fuchs, der mit seinen Kindern im Wald lebte und gern spazieren ging."
    assert clean(german, PrepareSettings(languages=("en", "zh"))).dropped_by == "other language"


def test_repair() -> None:
    assert (
        repair("doesnâ€™t\u200b &amp; schÃ¶n\r\n\r\n\r\n\r\nnext\x00 line \t here")
        == "doesn’t & schön\n\nnext line here"
    )
    assert repair("AT&T, R&D: 5 < 6") == "AT&T, R&D: 5 < 6"


def test_personal_data_is_scrubbed_and_numbers_stay() -> None:
    text = "Write to jane.doe+x@mail.example.org or call +44 20 7946 0958; card 4111 1111 1111 1111, host 192.168.0.17."
    assert scrub_personal(text) == "Write to <EMAIL> or call <TELEPHONE>; card <CARD_NUMBER>, host <IP_ADDRESS>."
    kept = "In 1998-2004 it cost 12 000, version 3.11.2, order 1234 5678 9012 3456, on 2024-05-06."
    assert scrub_personal(kept) == kept


def test_every_kind_of_input(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("first tale\n<|endoftext|>\nsecond tale\n<|endoftext|>\n", encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"zipped tale"))
    write_jsonl(folder / "c.jsonl", ["json tale"])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["parquet tale"]}), folder / "d.parquet")
    paragraph = "A fox and a crow met at the river and spoke of cheese for a long while. " * 4
    page = (
        f"<html><body><nav><a href='/'>Home</a></nav><article><h1>Tale</h1><p>{paragraph}</p></article></body></html>"
    )
    (folder / "e.html").write_text(page, encoding="utf-8")
    (folder / "f.md").write_text("---\ntitle: x\n---\n# A [tale](http://x.y)\n\nof **two** foxes\n", encoding="utf-8")
    (folder / "ignored.bin").write_bytes(b"\0")
    texts = [text for part in find_parts([str(folder)], "auto") for text in read_documents(part, OPEN)]
    assert [text.strip() for text in texts[:5]] == [
        "first tale",
        "second tale",
        "zipped tale",
        "json tale",
        "parquet tale",
    ]
    assert "spoke of cheese" in texts[5] and "Home" not in texts[5]
    assert texts[6].split() == ["A", "tale", "of", "two", "foxes"]
    assert plain_html("") == "" and plain_markdown("```\n# code\n```") == "```\n# code\n```"


def test_halves_of_surrogate_pairs_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a \\ud83d tale \\ud83e\\udd8a"}\n', encoding="utf-8")
    assert prepared(tmp_path / "out", tmp_path / "in.jsonl", OPEN) == ["a tale 🦊"]
    assert list(texts_of([str(tmp_path / "in.jsonl")])) == ["a  tale 🦊"]


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    texts = [f"tale number {number} of the long road" for number in range(40)]
    settings = dataclasses.replace(OPEN, validation_share=0.5)
    splits = []
    for name in ("one", "other"):
        prepare([str(write_jsonl(tmp_path / f"{name}.jsonl", texts))], tmp_path / name, settings)
        splits.append([list(split_texts(tmp_path / name, split)) for split in ("train", "validation")])
    assert splits[0] == splits[1] and min(map(len, splits[0])) > 5


def test_results_and_folders_are_no_inputs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", ["a tale"])
    (tmp_path / "x.parquet").mkdir()
    for _ in range(2):
        assert prepared(tmp_path / "out", tmp_path, OPEN) == ["a tale"]


def test_a_dataset_of_the_hub_is_streamed(tmp_path: Path) -> None:
    """`datasets` opens a local folder by the same call as a name of the hub."""
    write_jsonl(tmp_path / "train.jsonl", ["one tale", "another tale"])
    [part] = find_parts([f"hub:{tmp_path}"], "auto")
    assert list(read_documents(part, OPEN)) == ["one tale", "another tale"]


@pytest.mark.parametrize("form", ["separator", "blank-line", "line", "json"])
def test_parts_of_a_large_file_lose_and_double_nothing(tmp_path: Path, form: str) -> None:
    texts = [f"text {number} " + "x" * (number % 37) for number in range(200)]
    ends = {"separator": "\n<|endoftext|>\n", "blank-line": "\n\n", "line": "\n"}
    path = tmp_path / "large"
    if form == "json":
        write_jsonl(path, texts)
    else:
        path.write_text("".join(text + ends[form] for text in texts), encoding="utf-8")
    size, settings = path.stat().st_size, PrepareSettings(text_documents="auto" if form == "json" else form)
    for step in (1, 7, 64, 1000):
        kind = "json" if form == "json" else "text"
        parts = [Part(str(path), kind, start, min(start + step, size)) for start in range(0, size, step)]
        found = [text.strip() for part in parts for text in read_documents(part, settings)]
        assert found == [text.strip() for text in texts]


def test_packed_tokens_are_those_of_the_texts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    chooser = random.Random(2)
    texts = [sentences(words_of(chooser, 40)) for _ in range(50)]
    source, folder = write_jsonl(tmp_path / "in.jsonl", texts), write_tokenizer(tmp_path / "tokenizer")
    settings = PrepareSettings(validation_share=0.3, quality=False, workers=1)
    report = prepare([str(source)], tmp_path / "out", settings, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for split in ("train", "validation"):
        data, kept = TokenDataset(tmp_path / "out" / "tokens", split), list(split_texts(tmp_path / "out", split))
        assert [tokenizer.decode(data.document(number).tolist()) for number in range(len(data))] == kept
        assert data.num_tokens == report["tokens"][split] and data.num_bytes == sum(len(text.encode()) for text in kept)
        assert data.document(1, 3, 5).tolist() == data.document(1)[3:8].tolist()
    assert 5 < len(data) < 25


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        write_jsonl(
            folder / f"{number}.jsonl", [f"tale number {number} {word} of the long road" for word in "abcdefgh"]
        )
    whole = prepared(tmp_path / "whole", folder, OPEN)
    read, count = preparation.read_part, 0

    def failing(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(preparation, "read_part", failing)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "out", folder, OPEN)
    monkeypatch.setattr(preparation, "read_part", lambda *job: (calls.append(job), read(*job)))
    calls: list[object] = []
    assert prepared(tmp_path / "out", folder, OPEN) == whole and len(calls) == 2
    assert not (tmp_path / "out" / "parts").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in page and "http" not in page


def test_processes_give_the_same_result_as_one(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    planted = planted_corpus(20, 10)
    for number in range(2):
        write_jsonl(folder / f"{number}.jsonl", planted.texts[number::2])
    settings = PrepareSettings(quality=False, validation_share=0.2, workers=2)
    prepare([str(folder)], tmp_path / "two", settings)
    prepare([str(folder)], tmp_path / "one", PrepareSettings(quality=False, validation_share=0.2, workers=1))
    for split in ("train", "validation"):
        assert list(split_texts(tmp_path / "two", split)) == list(split_texts(tmp_path / "one", split))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file or folder"):
        prepare([str(tmp_path / "none")], tmp_path / "out", OPEN)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="no known kind"):
        prepare([str(tmp_path / "x.bin")], tmp_path / "out", OPEN)
    source = write_jsonl(tmp_path / "in.jsonl", ["a tale"])
    with pytest.raises(ConfigError, match=r"it has text.*--text-key"):
        prepare([str(source)], tmp_path / "keys", PrepareSettings(text_key="content", workers=1))
    with pytest.raises(ConfigError, match=r"no document passed.*report.html"):
        prepare([str(source)], tmp_path / "empty", PrepareSettings(workers=1))
    prepare([str(source)], tmp_path / "out", OPEN)
    with pytest.raises(ConfigError, match="other inputs or settings"):
        prepare([str(source)], tmp_path / "out", PrepareSettings(workers=1))
    with pytest.raises(ConfigError, match="not empty"):
        prepare([str(source)], tmp_path, OPEN)
    with pytest.raises(ConfigError, match="against"):
        prepare([str(source)], tmp_path / "leaks", PrepareSettings(against=(str(tmp_path / "none.jsonl"),)))
    with pytest.raises(ConfigError, match="similarity"):
        PrepareSettings(similarity=0)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1, and no more")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a tale " * 100)[:30])
    for name, message in (
        ("numbers.parquet", "no text under the key 'text' but int.*--text-key"),
        ("broken.parquet", "broken.parquet cannot be read"),
        ("cut.txt.gz", "cut.txt.gz cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare([str(tmp_path / name)], tmp_path / f"{name}.out", OPEN)


def test_mistakes_are_found_before_the_work(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["a tale"])
    (tmp_path / "bad.jsonl").write_text("no JSON")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    for name in ("bad.jsonl", "latin.txt"):
        with pytest.raises(ConfigError, match=f"against: .*{name} cannot be read"):
            prepare([str(source)], tmp_path / "out", PrepareSettings(against=(str(tmp_path / name),)))
    with pytest.raises(ConfigError, match="against: there is no file"):
        prepare([str(source)], tmp_path / "out", PrepareSettings(against=(str(tmp_path),)))
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        prepare([str(source)], tmp_path / "out", OPEN, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        prepare([str(source)], tmp_path / "out", OPEN, tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="choose another --out"):
        prepare([str(source)], source, OPEN)
