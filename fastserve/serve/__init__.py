"""The HTTP server: OpenAI-compatible endpoints over an EngineClient. Never imports torch or transformers."""
