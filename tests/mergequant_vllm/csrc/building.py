"""setup.py's extension built by itself, for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def build_extension(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build it into `folder`, with other environment variables."""
    places = ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, "MERGEQUANT_NATIVE": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
