"""Routing: one contract, selection policies, one file per router."""
