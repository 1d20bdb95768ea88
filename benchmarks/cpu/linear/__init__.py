"""One linear on a CPU, beside what a user would otherwise pick."""
