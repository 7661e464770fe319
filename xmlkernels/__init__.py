"""Train and serve text classifiers with millions of labels, with kernels of their own."""

from xmlkernels.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "__version__"]
