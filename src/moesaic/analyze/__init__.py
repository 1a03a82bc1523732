"""What a routed model does with its experts: trained, measured, predicted, reported."""
