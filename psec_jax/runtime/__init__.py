"""Training without the learning: the loop, saves, metrics, devices, processes."""
