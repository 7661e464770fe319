"""Models: an encoder, the tables of its labels, and the step that trains both."""
