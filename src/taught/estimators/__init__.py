"""How the inner product of an example with a query is obtained."""
