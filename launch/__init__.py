"""Commands: flags in, one call of the package each."""
