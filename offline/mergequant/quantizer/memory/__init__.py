"""How much memory a run needs, and how much there is."""
