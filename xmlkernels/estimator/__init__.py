"""The package's training and predictions behind scikit-learn's interface."""
