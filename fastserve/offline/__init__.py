"""Text in, text out, in this process."""
