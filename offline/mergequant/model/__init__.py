"""A 16-bit model: its files, its architecture, and its blocks run one at a time."""
