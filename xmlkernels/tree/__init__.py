"""The label tree: label vectors, label graph, balanced clusters, and the levels made of them."""
