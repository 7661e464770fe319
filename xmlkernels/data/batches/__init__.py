"""Batches of documents with their positives."""
