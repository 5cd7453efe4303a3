"""What a run does, from a job to an entry of the library."""
