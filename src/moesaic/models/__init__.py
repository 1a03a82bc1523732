"""Routed models on top of any Hugging Face decoder: find FFNs, replace them, save, load."""
