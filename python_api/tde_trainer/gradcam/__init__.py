"""What a trained network looks at (Figure 5 of the paper)."""
