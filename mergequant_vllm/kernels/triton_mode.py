"""Whether Triton interprets its programs, which needs no GPU, or compiles them.

A `program.py` holds a kernel's Triton functions. It imports Triton as it is imported, so it is
imported only where a kernel is launched: everything else loads where Triton is absent, and
TRITON_INTERPRET is read then.
"""

import os


def interpreted() -> bool:
    """Return whether the user asks Triton to interpret programs."""
    return os.environ.get("TRITON_INTERPRET") == "1"
