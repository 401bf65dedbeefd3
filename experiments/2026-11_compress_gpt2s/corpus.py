"""Find which installed packages the corpus of the first records was: 12, known by their files and bytes.

    python experiments/2026-11_compress_gpt2s/corpus.py

Prints what `measure.py --packages` takes. All subsets of the largest 48 packages are tried, as the sums of two halves;
one that also splits into the recorded bytes of training and validation text is the corpus.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES, FILES, BYTES, VALID_BYTES, VALID_FRACTION = 12, 9634, 172280379, 3451127, 0.02
CANDIDATES = 48
Document = tuple[str, int]  # path below site-packages, bytes


class Package(NamedTuple):
    """A package with its Python sources."""

    name: str
    documents: list[Document]

    @property
    def key(self) -> int:
        """Packages, files and bytes in one number, such that keys of packages add up."""
        return (1 << 48) + (len(self.documents) << 32) + sum(size for _, size in self.documents)


def installed(root: Path) -> list[Package]:
    """List the packages below a folder, the largest first, as far as they may be in the corpus."""
    found = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        documents = []
        for file in folder.rglob("*.py"):
            path, content = file.relative_to(root), file.read_bytes() if file.is_file() else b""
            if content.strip() and b"\0" not in content and not any(part.startswith(".") for part in path.parts):
                documents.append((path.as_posix(), len(content)))
        found.append(Package(folder.name, documents))
    sizes = {package.name: sum(size for _, size in package.documents) for package in found}
    found = [package for package in found if 0 < sizes[package.name] <= BYTES]
    return sorted(found, key=lambda package: -sizes[package.name])[:CANDIDATES]


def sums(packages: list[Package]) -> np.ndarray:
    """Return the keys of all subsets; bit k of an index stands for package k."""
    total = np.zeros(1, np.int64)
    for package in packages:
        total = np.concatenate([total, total + package.key])
    return total


def subset(packages: list[Package], index: int) -> list[Package]:
    """Return the packages that an index of `sums` stands for."""
    return [package for bit, package in enumerate(packages) if index >> bit & 1]


def valid_bytes(packages: list[Package]) -> int:
    """Return the bytes that `blrlab.data` would hold back for validation."""
    documents = sorted(
        (document for package in packages for document in package.documents),
        key=lambda document: hashlib.sha256(document[0].encode()).digest(),
    )
    held = 0
    for _, size in documents[:-1]:
        if held >= VALID_FRACTION * BYTES:
            break
        held += size
    return held


def main() -> None:
    """Print every set of packages that has the right numbers."""
    packages = installed(Path(np.__file__).resolve().parents[1])
    first, second = packages[0::2], packages[1::2]
    of_first, of_second = sums(first), sums(second)
    wanted = (PACKAGES << 48) + (FILES << 32) + BYTES - of_first
    order = np.argsort(of_second)
    places = np.minimum(np.searchsorted(of_second[order], wanted), len(order) - 1)
    for index in np.flatnonzero(of_second[order[places]] == wanted):
        found = subset(first, int(index)) + subset(second, int(order[places[index]]))
        told = "the corpus" if valid_bytes(found) == VALID_BYTES else "no: it splits otherwise"
        print(f"{','.join(sorted(package.name for package in found))}: {told}")


if __name__ == "__main__":
    main()
