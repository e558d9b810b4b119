"""TDE for networks that are trained already: features, a classifier's weight, the direction, alpha."""
