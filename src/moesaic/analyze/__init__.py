"""What a routed model does with its experts: measured, predicted, reported; nothing here changes a model."""
