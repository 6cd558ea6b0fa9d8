"""What tests get: one seed, their share of the cores, no downloads from Hugging Face, no GPU test without a GPU."""

from __future__ import annotations

import os

# Set before torch and tokenizers are imported, and inherited by the processes that tests start.
# The process that starts pytest-xdist's workers comes through here first, and they inherit what it has set.
CORES, WORKERS = os.cpu_count() or 1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = min(int(os.environ.get("OMP_NUM_THREADS", CORES)), max(1, CORES // WORKERS))
os.environ["OMP_NUM_THREADS"] = str(THREADS)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
for name in ("MINIDS_CACHE", "MINIDS_KERNELS", "TRITON_INTERPRET"):
    os.environ.pop(name, None)
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it cuBLAS refuses torch's deterministic mode

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(THREADS)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels run on CPU tensors where asked to,
    os.environ["MINIDS_KERNELS"] = "torch"  # by the `backend` fixture


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serves all ops by PyTorch on the CPU, then by Triton: on the GPU where there is one, else in the interpreter."""
    from minids_kernels import _launch

    monkeypatch.setattr(_launch, "BACKEND", request.param)
    return str(request.param)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of a test with `backend` lie."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
