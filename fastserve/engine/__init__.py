"""Run models for many requests: memory, steps, processes. Import what you need from the modules; this stays light."""
