"""What is trained: each module has a frozen config, `init` and `update`."""
