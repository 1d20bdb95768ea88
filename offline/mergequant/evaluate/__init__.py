"""What a checkpoint holds, and how well a model does on a text."""
