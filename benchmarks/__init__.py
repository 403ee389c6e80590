"""Side-by-side measurements; each writes benchmarks/results/NAME.json (see README.md)."""
