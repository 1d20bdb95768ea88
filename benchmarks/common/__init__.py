"""What the measurements share: shapes, results, the device, variants that are served."""
