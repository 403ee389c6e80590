"""What the influences say: interference between features, and which pairs to drop."""
