"""Training a head over more classes than data could be kept for: throughput and memory on one process or several."""
