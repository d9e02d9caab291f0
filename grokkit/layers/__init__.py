"""The parts of a decoder layer, one a file."""
