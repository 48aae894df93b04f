"""What people give back on the labels of a run, and which scan to look at next."""
