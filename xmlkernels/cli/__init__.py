"""The commands: one module per command, with a `main(words)`; they alone read flags and print."""
