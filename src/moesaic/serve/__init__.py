"""The live server: an expert store, an engine that drives the policies of `schedule/`, and an OpenAI-compatible API."""
