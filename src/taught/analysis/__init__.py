"""What the influences say: interference between features, and which examples to drop."""
