"""Predictors: folders that training has written, and texts, to labels."""
