"""Losses over plans: unweighted functions; the trainer owns the coefficients."""
