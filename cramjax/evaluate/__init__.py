"""What is measured after a run: baselines on the same held-out text, and the score of any other text."""
