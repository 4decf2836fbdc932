from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyMpilm(PythonPackage):
    """Language-model training over MPI."""

    homepage = "https://pypi.org/project/mpilm/"
    pypi = "mpilm/mpilm-0.1.0.tar.gz"

    license("Apache-2.0")

    version("0.1.0", sha256="0000000000000000000000000000000000000000000000000000000000000000")

    variant("data", default=True, description="Read Parquet files")
    variant("report", default=True, description="Draw the figures of reports")

    depends_on("python@3.10:", type=("build", "run"))
    depends_on("py-setuptools@68:", type="build")

    with default_args(type="run"):
        depends_on("py-torch@2.6:")
        depends_on("py-numpy@1.26:")
        depends_on("py-mpi4py@4:")
        depends_on("py-safetensors@0.4.5:")
        depends_on("py-tokenizers@0.20:")
        depends_on("py-tyro@0.9:")
        depends_on("py-rich@13:")
        depends_on("py-tomli-w@1:")
        depends_on("py-jinja2@3.1:")
        depends_on("py-tomli@2:", when="^python@:3.10")
        depends_on("py-pyarrow@15:", when="+data")
        depends_on("py-plotly@6:", when="+report")
        depends_on("py-matplotlib@3.8:", when="+report")
        depends_on("py-tensorboard@2.16:", when="+report")
