"""The layers keep the kernel hub's rules, and a variant built as for the hub loads and serves a model."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from minids_kernels import layers
from torch import Tensor, nn

from tests.kernels.numerics import assert_near, error_bound

KERNELS = Path(__file__).parents[2] / "kernels"
LAYERS = [getattr(layers, name) for name in layers.__all__]
WIDTH = 24


class Norm(nn.Module):
    """As in transformers: rounds, then multiplies by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(WIDTH) / 4)
        self.variance_epsilon = 1e-5

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, (WIDTH,), self.weight, self.variance_epsilon)


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up


SERVED = {"RMSNorm": Norm, "SwiGLU": SiluAndMul}


def served(layer: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model's own layer, and a twin whose forward is the kernel's: what kernelize does."""
    own = SERVED[layer.__name__]()
    twin = SERVED[layer.__name__]()
    twin.load_state_dict(own.state_dict())
    twin.forward = layer.forward.__get__(twin)  # type: ignore[method-assign]
    return own, twin


def assert_same_values_and_gradients(own: nn.Module, twin: nn.Module, device: str | torch.device = "cpu") -> None:
    own, twin = own.to(device), twin.to(device)
    x = torch.randn(3, 5, WIDTH, device=device)
    dout = torch.randn_like(own(x))
    results = []
    for layer in (own, twin):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        results.append((out.detach(), *torch.autograd.grad(out, [leaf, *layer.parameters()], dout)))
    for got, want in zip(results[1], results[0], strict=True):
        assert_near(got, want.double(), error_bound(torch.float32, 8, WIDTH))


@pytest.mark.parametrize("layer", LAYERS, ids=layers.__all__)
def test_rules_of_the_hub(layer: type[nn.Module]) -> None:
    """kernels.layer.layer._validate_layer, in our words."""
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    added = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert added == {"has_backward", "can_torch_compile"}
    ours, theirs = (inspect.signature(cls.forward).parameters for cls in (layer, SERVED[layer.__name__]))
    assert [p.kind for p in ours.values()] == [p.kind for p in theirs.values()]


def test_sources_import_themselves_relatively() -> None:
    """A kernel from the hub goes by another name than minids_kernels, and may import torch and triton only."""
    for path in (KERNELS / "minids_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            assert not any(name.split(".")[0] == "minids_kernels" for name in names), path


@pytest.mark.parametrize("layer", LAYERS, ids=layers.__all__)
def test_has_backward(layer: type[nn.Module], device: torch.device) -> None:
    assert layer.has_backward
    assert_same_values_and_gradients(*served(layer), device)


@pytest.mark.parametrize("layer", LAYERS, ids=layers.__all__)
def test_can_torch_compile(layer: type[nn.Module]) -> None:
    assert layer.can_torch_compile
    own, twin = served(layer)
    assert_same_values_and_gradients(own, torch.compile(twin, fullgraph=True, backend="aot_eager"))


def built_variant(folder: Path, backend: str) -> Path:
    """`folder` as a repository of the hub would be after kernel-builder ran: build/torch-<backend> with metadata.json,
    and an _ops.py with a namespace of the build."""
    general = tomllib.loads((KERNELS / "build.toml").read_text())["general"]
    assert backend in general["backends"]
    variant = folder / "build" / f"torch-{backend}"
    shutil.copytree(KERNELS / "minids_kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
    unique = f"_{general['name'].replace('-', '_')}_{backend}_1a2b3c4"
    ops = (variant / "_ops.py").read_text()
    assert ops.count('_NAMESPACE = "minids_kernels"') == 1
    (variant / "_ops.py").write_text(ops.replace('"minids_kernels"', f'"{unique}"'))
    described = {key: general[key] for key in ("name", "version", "license")}
    described |= {"id": unique, "python-depends": [], "backend": {"type": backend}}
    (variant / "metadata.json").write_text(json.dumps(described))
    return folder


@pytest.fixture
def hub() -> ModuleType:
    """Hugging Face's package; asked for by its metadata, since the checkout's folder of that name imports as well."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("needs Hugging Face's package `kernels`")
    return import_module("kernels")


def test_a_built_variant_loads_and_serves(hub: ModuleType, tmp_path: Path) -> None:
    """The hub takes variants for what torch was built for, whatever the device is."""
    backend = "cuda" if torch.version.cuda else "cpu"
    repository = built_variant(tmp_path, backend)
    loaded = hub.get_local_kernel(repository, backend=backend)
    assert loaded.__file__.startswith(str(tmp_path)) and "rms_norm" in loaded.__all__
    assert loaded.rms_norm.__globals__["_rms_norm"].registered._qualname.startswith(
        f"_minids_kernels_{backend}_1a2b3c4::"
    )
    assert loaded.layers.RMSNorm is not layers.RMSNorm

    mapping = {name: {"cpu": hub.LocalLayerRepository(repo_path=repository, layer_name=name)} for name in SERVED}
    for name, layer in SERVED.items():
        cls = hub.use_kernel_forward_from_hub(name)(type(name, (layer,), {}))
        own, model = cls(), nn.Sequential(cls())
        model[0].load_state_dict(own.state_dict())
        with hub.use_kernel_mapping(mapping):
            hub.kernelize(model, device="cpu", mode=hub.Mode.TRAINING | hub.Mode.TORCH_COMPILE, use_fallback=False)
        assert sys.modules[model[0].forward.__func__.__module__].__file__.startswith(str(tmp_path))
        assert_same_values_and_gradients(own, model[0])
        assert_same_values_and_gradients(own, torch.compile(model[0], fullgraph=True, backend="aot_eager"))


def test_the_builder_reads_our_description(hub: ModuleType) -> None:
    general = hub._rust.Build.open(KERNELS).general
    assert {str(backend) for backend in general.backends} == {"cpu", "cuda", "rocm"}
