"""Label trees: features of labels, balanced clusters, the tree, and reports on it."""
