"""What every method is made of: names, targets, problems, losses of examples, and the one driver."""
