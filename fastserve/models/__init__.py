"""What a network is, for serving: lean modules over ragged batches, paged memory and merged weights."""
