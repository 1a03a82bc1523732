"""The OpenAI-compatible HTTP API of a running engine."""
