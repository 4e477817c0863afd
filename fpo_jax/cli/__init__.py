"""The programs of the `fpo` command."""
