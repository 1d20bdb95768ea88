"""What the method loses and costs: accuracy, defaults, reconstruction, memory."""
