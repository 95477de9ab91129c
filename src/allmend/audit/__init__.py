"""What a model memorised: measures of one model on canaries and records, each with its null and interval."""
