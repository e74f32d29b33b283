"""Packages that spkd needs, by its own metadata: which are there, which are too old, which extra brings the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import PurePath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from spkd import faiss_library

PROJECT = "spkd"
FOR_TESTS = ("dev", "oracles", "site")  # extras that no command needs


@dataclass(frozen=True)
class Package:
    """A package that spkd or an extra needs.

    Attributes:
        wanted: the requirement, such as `torch>=2.11`.
        extra: the extra that needs it; "" where spkd itself does.
        version: None where it is not installed.
    """

    name: str
    wanted: Requirement
    extra: str
    version: str | None

    @property
    def is_too_old(self) -> bool:
        return self.version is not None and not self.wanted.specifier.contains(self.version, prereleases=True)


def needed() -> list[Package]:
    """Every package that spkd or one of its extras needs on this machine.

    Raises:
        PackageNotFoundError: spkd is not installed, but its folder is imported.
    """
    return list(_needed("", {}))


def _needed(extra: str, seen: dict[str, None]) -> Iterator[Package]:
    own = distribution(PROJECT)
    requirements = [Requirement(line) for line in own.requires or ()]
    for name in ("", *(own.metadata.get_all("Provides-Extra") or ())):
        if name in FOR_TESTS:
            continue
        for wanted in requirements:
            is_of = wanted.marker is None or wanted.marker.evaluate({"extra": name})
            is_of_spkd = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            if is_of and is_of_spkd == (name == "") and wanted.name != PROJECT:
                yield Package(canonicalize_name(wanted.name), wanted, name, version_of(wanted.name))


def version_of(name: str) -> str | None:
    """Version of an installed package; None where it is not installed, or its metadata is damaged."""
    found = found_of(name)
    return None if found is None else found.metadata["Version"]


def found_of(name: str) -> Distribution | None:
    """An installed package; None where it is not installed."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def module_of(name: str) -> str:
    """Module that an installed package is imported as: that of its name, or else the first that has no underscore."""
    own, found = name.replace("-", "_"), found_of(name)
    files = [] if found is None else [file for file in found.files or () if file.suffix in (".py", ".so")]
    names = {file.parts[0] if len(file.parts) == 2 else file.name.partition(".")[0] for file in files if _is_top(file)}
    public = sorted(each for each in names if each.isidentifier() and not each.startswith("_"))
    return own if own in public or not public else public[0]


def _is_top(file: PurePath) -> bool:
    return len(file.parts) <= 2 and ".." not in file.parts


def extras(packages: list[Package]) -> Mapping[str, frozenset[str]]:
    """Name of each extra -> names of the packages that it brings."""
    names = dict.fromkeys(each.extra for each in packages if each.extra)
    own = {each.name for each in packages if not each.extra}
    return {name: frozenset({e.name for e in packages if e.extra == name} - own) for name in names}


def missing(packages: list[Package], has_gpu: bool) -> dict[str, list[str]]:
    """Name of each extra that is not complete -> names of its packages that are not there; of spkd itself, "".

    Args:
        has_gpu: whether FAISS for CUDA is what this machine needs.
    """
    absent: dict[str, list[str]] = {}
    has_faiss = bool(faiss_library.packages())
    for each in packages:
        is_unused = each.name.startswith(faiss_library.PREFIX) and (has_faiss or each.name.endswith("gpu") != has_gpu)
        if each.version is None and not is_unused:
            absent.setdefault(each.extra, []).append(each.name)
    return absent


def conflicts(packages: list[Package]) -> list[str]:
    """Packages that do not work together, each with what to do: a sentence.

    What an extra asks of a package of spkd itself counts where another of its packages is installed.
    """
    found = {}
    brought = extras(packages)
    present = {each.name for each in packages if each.version is not None}
    for each in packages:
        if each.is_too_old and (not each.extra or brought[each.extra] & present):
            beside = "" if each.name in brought.get(each.extra, ()) or not each.extra else _beside(brought, each.extra)
            found[f"{each.name} {each.version} is installed{beside}, and {_bare(each)} is needed"] = (
                f'pip install -U "{_bare(each)}"'
            )
    if len(several := faiss_library.packages()) > 1:
        names = " and ".join(several)
        found[f"{names} are installed, and each overwrites files of the other's module faiss"] = (
            f"pip uninstall {' '.join(several)}, then {faiss_library.EXTRAS}"
        )
    return [f"{what}: {remedy}" for what, remedy in found.items()]


def _bare(package: Package) -> str:
    return f"{package.wanted.name}{package.wanted.specifier}"


def _beside(brought: Mapping[str, frozenset[str]], extra: str) -> str:
    return f" beside {' and '.join(sorted(brought[extra]))}"
