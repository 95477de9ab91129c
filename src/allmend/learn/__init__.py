"""What one party does with a model and its own records: training steps, and scores on held-out records."""
