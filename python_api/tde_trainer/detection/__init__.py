"""Detection and instance segmentation on LVIS."""
