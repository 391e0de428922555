"""The command `fastserve`: one thin file per verb; parses, calls one function, prints."""
