"""What tests of vLLM's own layers share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def _ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A vLLM of one rank, without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    store = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()
