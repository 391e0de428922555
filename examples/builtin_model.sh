#!/usr/bin/env bash
# The built-in model from raw books: texts, tokenizer, pretraining, chat tuning, scores. `make builtin-model` runs it.
#
# Run it in the repository. The books are looked for in $FASTSERVE_SHARED/data/corpora, else ../shared/data/corpora.
# A step that was stopped goes on, and one that is done is passed over quickly, when the script is started again.
# On one core of a server CPU with bfloat16 instructions it takes about an hour and a half; a GPU is used if there is one.
set -euo pipefail
out=build/builtin-model # configs/builtin.toml names this folder too
bin=${BIN:-.venv/bin}

step() { printf '\n== %s\n' "$*" >&2; }

step "texts and chats of the raw books"
[ -f $out/texts.json ] || "$bin/python" -m fastserve.train.storyteller texts configs/builtin_texts.toml --out $out

step "tokenizer"
[ -f $out/tokenizer/tokenizer.json ] || "$bin/fastserve" tokenizer train \
  $out/texts/storybooks.jsonl $out/texts/stories.jsonl --out $out/tokenizer --vocab-size 4096 --chat --max-length 1024

step "token shards"
for source in storybooks stories classics classics_2; do
  "$bin/fastserve" data prepare $out/texts/$source.jsonl --out $out/data/$source --tokenizer $out/tokenizer \
    --validation-share 0 --against $out/held_out/held_out.jsonl --against $out/held_out/storybooks.jsonl
done
"$bin/fastserve" data prepare $out/held_out/held_out.jsonl --out $out/data/held_out --tokenizer $out/tokenizer \
  --validation-share 0 --no-quality --no-near-duplicates

step "pretraining"
"$bin/fastserve" pretrain configs/builtin.toml --out $out/pretrain

step "chat tuning"
"$bin/fastserve" finetune instruction $out/pretrain/model --data $out/chats.jsonl --out $out/chat \
  --epochs 1 --batch-size 16 --max-length 512 --learning-rate 1e-3 --validation-share 0.01 --dtype bfloat16

step "scores and card"
"$bin/python" -m fastserve.train.storyteller finish configs/builtin_texts.toml --out $out
