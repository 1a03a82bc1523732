"""What to run next, what to keep, what to fetch: pure, seeded policies without torch and without a clock."""
