"""Reproduction of "All Roads Lead to Likelihood": one module per stage of the experiment."""
