"""Which kernel serves a linear, and which code writes its activation codes."""
