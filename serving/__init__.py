"""Putting a trained ranker to use."""
