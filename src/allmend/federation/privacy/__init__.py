"""What protects members and their records in training, and what that protection costs."""
