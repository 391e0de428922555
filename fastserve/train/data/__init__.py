"""Raw text in, clean text and token shards out: what `fastserve data prepare` does, and the reader of its shards."""
