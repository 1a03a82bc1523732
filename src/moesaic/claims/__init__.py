"""Papers' headlines as small seeded experiments: one file per paper in `claims/papers`, found by its name."""
