"""One linear on a GPU, beside what a user would otherwise pick."""
