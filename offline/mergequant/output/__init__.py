"""A checkpoint in the making: what it will hold, and files that are whole or absent."""
