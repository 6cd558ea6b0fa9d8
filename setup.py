"""Maps `minids_kernels` to kernels/minids_kernels. `kernels/` itself must never become a package: a top-level package
of that name would shadow Hugging Face's `kernels` (tests/test_layout.py)."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(".", include=["minids", "minids.*"]), *find_packages("kernels")],
    package_dir={"minids_kernels": "kernels/minids_kernels"},
    package_data={"minids": ["py.typed"], "minids_kernels": ["py.typed", "configs/*.json"]},
)
