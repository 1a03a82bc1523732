"""One file per paper; each defines `CLAIM`. A new file is found without being listed anywhere.

No file here imports torch at its top: `moesaic claims list` reads them all.
"""
