"""Builders of dataset folders, found through the entry-point group ``dashclip.datasets``."""
