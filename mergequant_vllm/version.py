"""The range of vLLM releases that the plugin was written and tested against."""

from packaging.version import InvalidVersion, Version

OLDEST = Version("0.26")
NEWEST = Version("0.33")


def unsupported_vllm(version: str | None = None) -> str | None:
    """Why `version` of vLLM (default: the installed one) is not supported; None if it is."""
    if version is None:
        import vllm

        version = str(vllm.__version__)
    wanted = f"mergequant-vllm serves with vLLM {OLDEST} to {NEWEST}"
    remedy = "install a release in that range, or a newer mergequant-vllm."
    try:
        release = Version(version).release
    except InvalidVersion:
        return f"{wanted}; the installed version {version!r} cannot be read: {remedy}"
    if OLDEST.release <= release[:2] <= NEWEST.release:
        return None
    return f"{wanted}; the installed version is {version}: {remedy}"
