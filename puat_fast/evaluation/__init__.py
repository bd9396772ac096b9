"""Measuring trained classifiers."""
