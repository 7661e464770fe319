"""Rankers: sparse linear classifiers that rank the labels of a shortlist again."""
