"""Timings of the ops against their peers: `python benchmarks/run.py --op OP --device cpu`."""
