"""Encoders, tables and heads: the modules that models are made of."""
