"""The policy: how a model decides to show a behavior, as a ridge regression on its features."""
