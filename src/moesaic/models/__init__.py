"""Routed models on top of any Hugging Face decoder: find FFNs, replace them, save, load."""

# First of all: importing transformers' Auto modules makes `moesaic.registration` import the modules of this package,
# which must not happen while one of them is half imported itself.
import transformers.models.auto.modeling_auto  # noqa: F401
