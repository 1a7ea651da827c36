"""Find the binary activations of a model by a dry run: read ``find.py`` first."""
