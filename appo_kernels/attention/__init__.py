"""Code shared by the operators on attention: arguments, tiles of keys, passes of each backend."""
