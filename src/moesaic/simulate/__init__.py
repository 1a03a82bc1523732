"""Serving systems on modelled devices: the policies of `schedule/` run on traces, without torch."""
