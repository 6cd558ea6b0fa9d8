"""The rules of the layout: what lies where, who may import whom, what the distribution holds, and that a folder called
`kernels` does no harm beside Hugging Face's package of that name."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {"pyproject.toml", "setup.py", "README.md", "README.zh.md", "LICENSE", "CONTRIBUTING.md", "constraints.txt"}
TOP_LEVEL = FILES | {".ci", ".gitignore", "minids", "kernels", "benchmarks", "tests"}

# What each part of minids may import of minids. train, infer, evaluate and convert lie on one level (all of them open
# checkpoints, which train writes), but train never imports infer; data and tokenizer know no model.
BASE = {"config", "device", "errors", "files", "graph", "precision", "signals"}
MIDDLE = BASE | {"tokenizer", "data", "model", "convert", "train"}
ALLOWED = {
    **dict.fromkeys(BASE, BASE),
    "terminal": BASE,
    "tokenizer": BASE | {"data"},  # trains on row files
    "data": BASE | {"tokenizer"},
    "corpus": BASE,
    "tasks": BASE | {"corpus"},
    "model": BASE,
    "train": MIDDLE | {"parallel"},
    "parallel": MIDDLE,
    "convert": MIDDLE,
    "infer": MIDDLE,
    "loading": MIDDLE | {"infer"},
    "talk": MIDDLE | {"infer", "loading"},
    "evaluate": MIDDLE | {"infer", "loading"},
}
TOP = {"cli", "quickstart", "doctor", "plan", "__main__", "__init__"}  # may import anything of minids
# fp8_quant: what fp8 rooms quantise with; swiglu, swiglu_quant: the activation inside moe, which must not exist twice;
# moe_plan: where moe's rows lie; grouped_gemm: the products inside moe, and how grouped_fp8_gemm numbers tiles;
# rms_norm: what rms_norm_quant computes before it quantises;
# fp8_gemm: the three products of fp8_linear, one expert's in grouped_fp8_gemm, as that is grouped_fp8_linear's, whose
# experts' codes moe has too; _*_torch, _*_triton, _*_hopper: a room's paths;
# mla_cache: rows that mla_decode and mla_prefill read, made by rms_norm and rope; mla_attention: mla_prefill's
ROOM_MAY_IMPORT = {
    "_operator",
    "_ops",
    "_checks",
    "_launch",
    "_fp8_gemm_hopper",
    "_grouped_fp8_gemm_hopper",
    "_grouped_gemm_hopper",
    "_mla_attention_torch",
    "_mla_attention_triton",
    "_mla_decode_hopper",
    "fp8_gemm",
    "fp8_quant",
    "grouped_fp8_gemm",
    "grouped_fp8_linear",
    "grouped_gemm",
    "mla_attention",
    "mla_cache",
    "moe_plan",
    "rms_norm",
    "rope",
    "swiglu",
    "swiglu_quant",
}
NOT_ROOMS = {"__init__", "layers", "compat"}


def tracked() -> list[str]:
    """Paths git would put into a commit: tracked files and new ones it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path, package_root: Path) -> Iterator[str]:
    """Absolute dotted names of everything the file imports, inside functions too; `from a import b` gives a.b."""
    package = path.relative_to(package_root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """The part of a package a dotted name or path belongs to: minids.train.loop -> train."""
    pieces = name.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def test_top_level_is_fixed() -> None:
    assert {name.split("/")[0] for name in tracked()} <= TOP_LEVEL
    assert all((ROOT / name).exists() for name in TOP_LEVEL)


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "minids_kernels" / "__init__.py").is_file()
    assert (ROOT / "minids" / "__init__.py").is_file()


def test_import_reader_sees_every_form(tmp_path: Path) -> None:
    """The checks below are worth what this function sees."""
    file = tmp_path / "pkg" / "sub" / "mod.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import a.b\nfrom c import d as e\ndef f():\n    from .g import h\n    from .. import i\n    from . import j\n"
    )
    assert list(imports(file, tmp_path)) == ["a.b", "c.d", "pkg.sub.g.h", "pkg.i", "pkg.sub.j"]


def test_minids_imports_go_one_way() -> None:
    wrong = []
    for path in sources("minids"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        own = part(name)
        if own in TOP:
            continue
        assert own in ALLOWED, f"{path}: say in tests/test_layout.py what minids.{own} may import"
        for target in imports(path, ROOT):
            if target.split(".")[0] == "minids" and part(target) not in ALLOWED[own] | {own}:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_kernels_import_only_torch_and_triton() -> None:
    allowed = {"torch", "triton", "minids_kernels", *sys.stdlib_module_names}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for path in sources("kernels")
        for target in imports(path, ROOT / "kernels")
        if target.split(".")[0] not in allowed
    ]
    assert not wrong


def test_rooms_do_not_import_each_other() -> None:
    wrong = []
    for path in sources("kernels"):
        name = ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
        own = part(name)
        if own in NOT_ROOMS:
            continue
        for target in imports(path, ROOT / "kernels"):
            if target.split(".")[0] == "minids_kernels" and part(target) not in ROOM_MAY_IMPORT | {own}:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_nobody_imports_what_is_banned() -> None:
    """`kernels` is Hugging Face's; transformers is a peer of the tests, no dependency; tests are imported by nobody."""
    banned = {"minids": {"kernels", "transformers", "tests", "benchmarks", "pytest", "hypothesis"}}
    banned["kernels"] = banned["minids"] | {"minids"}
    banned["benchmarks"] = {"kernels", "tests"}
    banned["tests"] = {"kernels"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for folder, names in banned.items()
        for path in sources(folder)
        for target in imports(path, ROOT / folder)
        if target.split(".")[0] in names
    ]
    assert not wrong


def test_dependencies_have_their_pin() -> None:
    """What the tests ran against is written down for every direct dependency they need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["plot"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert {requirement.split(">")[0].split(";")[0].strip() for requirement in wanted} <= pinned


# --- in processes of their own --------------------------------------------------------------------------------------


def python(code: str, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> str:
    """stdout of `code` in a fresh interpreter; the checkout's packages come after `path`."""
    entries = [*path, ROOT / "kernels", ROOT]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, entries))}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_the_kernels_touches_no_gpu_and_no_trainer() -> None:
    code = "import sys, minids_kernels, torch; print(torch.cuda.is_initialized(), 'minids' in sys.modules)"
    assert python(code) == "False False"


def test_importing_minids_is_light() -> None:
    assert python("import sys, minids; print('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"


def hugging_face_kernels(folder: Path) -> Path:
    """A stand-in for an installed Hugging Face `kernels` 0.18.2: the names transformers takes from it at import time
    (integrations/hub_kernels.py), and the metadata that makes transformers believe in it."""
    package, metadata = folder / "kernels", folder / "kernels-0.18.2.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (metadata / "RECORD").write_text("kernels/__init__.py,,\n")
    (package / "__init__.py").write_text(
        "HF = True\n\n\ndef __getattr__(name):\n"
        "    if name.startswith('__'):\n        raise AttributeError(name)\n"
        "    if name[0].isupper():\n        return type(name, (), {})\n"
        "    return lambda *args, **options: lambda decorated: decorated\n"
    )
    return folder


@pytest.mark.parametrize("order", ["theirs first", "ours first"])
def test_hugging_face_kernels_and_transformers_live_beside_us(tmp_path: Path, order: str) -> None:
    """From the checkout root, where `kernels/` is a plain folder, the name must be theirs whoever comes first."""
    theirs = hugging_face_kernels(tmp_path / "site")
    code = f"""
import sys
if {order == "ours first"}:
    sys.path.remove({str(theirs)!r})
    sys.path.insert(sys.path.index({str(ROOT)!r}) + 1, {str(theirs)!r})
from importlib.util import find_spec
from transformers.utils import import_utils
import minids_kernels
from transformers import DeepseekV3ForCausalLM
import kernels
print(import_utils.is_kernels_available(), kernels.HF, find_spec("kernels").origin, minids_kernels.__file__)
"""
    expected = f"True True {theirs}/kernels/__init__.py {ROOT}/kernels/minids_kernels/__init__.py"
    assert python(code, cwd=ROOT, path=(theirs,)) == expected


def test_transformers_sees_no_kernels_package_in_our_folder() -> None:
    code = """
from importlib.util import find_spec
import minids_kernels
from transformers import DeepseekV3ForCausalLM
spec = find_spec("kernels")
print(spec is None or spec.origin is None or "site-packages" in spec.origin)
"""
    assert python(code) == "True"


def test_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    """Built from a copy, so that the checkout stays clean."""
    copy = tmp_path / "copy"
    for name in tracked():
        if not name.startswith(("tests/", "benchmarks/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    built = subprocess.run([*command, str(copy)], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "No module named" in built.stderr and "setuptools" in built.stderr:
        pytest.skip("needs setuptools in this environment")
    assert built.returncode == 0, built.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    metadata = {name.split("/")[0] for name in names if ".dist-info/" in name}
    assert {name.split("/")[0] for name in names} == {"minids", "minids_kernels", *metadata}
    wanted = {path.relative_to(ROOT).as_posix() for path in sources("minids")}
    wanted |= {path.relative_to(ROOT / "kernels").as_posix() for path in sources("kernels")}
    wanted |= {"minids/py.typed", "minids_kernels/py.typed"}
    assert wanted <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
