"""What every estimator shares, and what a method of one's own is made of."""
