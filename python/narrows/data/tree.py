"""The groups and arrays of an HDF5 file or a zarr store, and the files that its links may reach.

- Everything below the root is reached through a `Tree`, one step at a time. So no link leaves the file unseen.
- HDF5 can leave a file in three ways: external links, external storage, and virtual datasets. Each is refused unless
  links are followed. Files that are read then are listed in `Tree.beside`.
- A link inside a folder may point to another place in the folder. `check_folder` refuses those that leave it.
- The path that the user gives may be a link itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .._extras import require
from ..errors import DataError
from .source import files_of

__all__ = ["Tree", "check_folder", "hdf5_tree", "is_group", "text_attribute", "zarr_tree"]

_DEPTH = 32  # links behind links; more are a circle


def is_group(node: Any) -> bool:
    return hasattr(node, "keys")


def text_attribute(node: Any, *names: str) -> str | None:
    """The first of some attributes that exists, as text. Files of other languages store it as bytes."""
    for name in names:
        if name in node.attrs:
            value = node.attrs[name]
            return value.decode() if isinstance(value, bytes) else str(value)
    return None


class Tree:
    """An open file or store.

    Attributes
    ----------
    path : Path
    root : group
    follow_links : bool
    beside : list of Path
        Other files that links led to, in the order of the first visit.
    """

    def __init__(self, path: Path, root: Any, closer: Callable[[], None], *, follow_links: bool = False) -> None:
        self.path, self.root, self.follow_links = path, root, follow_links
        self.beside: list[Path] = []
        self._closer = closer

    def close(self) -> None:
        self._closer()

    def where(self, node: Any) -> str:
        """The file and the place of a node in it, for messages."""
        return f"{self.path}: {node.name.strip('/') or 'root'}"

    def find(self, group: Any, name: str) -> Any:
        """The node at a path below a group; None if there is none.

        Raises
        ------
        DataError
            A link on the way leaves the file, and links are not followed.
        """
        parts = [part for part in name.split("/") if part]
        if not parts or not {".", ".."}.isdisjoint(parts):
            return None
        try:
            return group["/".join(parts)]
        except KeyError:
            return None

    def child(self, group: Any, name: str) -> Any:
        """The node at a path below a group; an error if there is none."""
        node = self.find(group, name)
        if node is None:
            place = group.name.strip("/")
            raise DataError(f"{self.path}: damaged: {f'{place}/{name}' if place else name} is missing")
        return node

    def referred(self, node: Any, target: Any, group: Any) -> Any:
        """The node that an attribute of `node` names: a path below `group`, or a reference of HDF5."""
        return self.child(group, str(target))


class _HDF5Tree(Tree):
    def __init__(self, path: Path, follow_links: bool) -> None:
        self._h5py = require("h5py", "anndata", f"reading {path.suffix} files")
        self._open: dict[Path, Any] = {}
        super().__init__(path, self._file(path), self._close, follow_links=follow_links)

    def _file(self, path: Path) -> Any:
        key = path.resolve()
        if key not in self._open:
            # Cluster file systems often refuse locks.
            self._open[key] = self._h5py.File(path, "r", locking="best-effort")
        return self._open[key]

    def _close(self) -> None:
        for file in self._open.values():
            file.close()

    def find(self, group: Any, name: str) -> Any:
        return self._walk(group, name, _DEPTH)

    def referred(self, node: Any, target: Any, group: Any) -> Any:
        if isinstance(target, self._h5py.Reference):
            return self._checked(node.file[target], _DEPTH)
        return super().referred(node, target.decode() if isinstance(target, bytes) else target, group)

    def _walk(self, group: Any, name: str, depth: int) -> Any:
        if depth == 0:
            raise DataError(f"{self.path}: damaged: the links to {name} go in a circle")
        node = group.file["/"] if name.startswith("/") else group
        for part in name.split("/"):
            if part in ("", "."):
                continue
            node = self._step(node, part.encode(), depth) if is_group(node) else None
            if node is None:
                return None
        return node

    def _step(self, group: Any, name: bytes, depth: int) -> Any:
        # The calls below look at the link alone. `name in group` would already open the other file.
        links = group.id.links
        if not links.exists(name):
            return None
        kind = links.get_info(name).type
        if kind == self._h5py.h5l.TYPE_HARD:
            return self._checked(group[name], depth)
        place = f"{group.name.strip('/')}/{name.decode(errors='replace')}".strip("/")
        if kind == self._h5py.h5l.TYPE_SOFT:
            return self._walk(group, links.get_val(name).decode(), depth - 1)
        if kind != self._h5py.h5l.TYPE_EXTERNAL:
            raise DataError(f"{self.path}: {place} is a link of an unknown kind")
        target, inside = (part.decode(errors="surrogateescape") for part in links.get_val(name))
        file = self._other(group, place, "is a link to", target, "HDF5_EXT_PREFIX")
        return self._walk(file["/"], inside, depth - 1)

    def _checked(self, node: Any, depth: int) -> Any:
        """A node whose values lie in the file, or in files that may be read."""
        if not isinstance(node, self._h5py.Dataset):
            return node
        place = node.name.strip("/")
        for target, _, _ in node.external or ():
            self._leave(place, "is stored in", target)
            prefix = os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(self.path.parent))
            self._note(place, Path(prefix, target))
        if node.is_virtual:
            for source in node.virtual_sources():
                target = source.file_name
                file = node.file
                if target != ".":
                    if "%" in target:
                        self._leave(place, "shows", target)
                        raise DataError(f"{self.path}: {place} shows files named by a pattern ({target}): copy them")
                    file = self._other(node, place, "shows", target, "HDF5_VDS_PREFIX")
                if self._walk(file["/"], source.dset_name, depth - 1) is None:  # HDF5 would show its fill value
                    raise DataError(f"{self.path}: {place} shows {source.dset_name} of {target}, which is missing")
        return node

    def _other(self, node: Any, place: str, verb: str, target: str, variable: str) -> Any:
        """Another HDF5 file, found in the order of HDF5."""
        given = Path(node.file.filename)
        prefixes = [p.replace("${ORIGIN}", str(given.parent)) for p in os.environ.get(variable, "").split(":") if p]
        name = Path(target)
        folders = [*map(Path, prefixes), given.parent, Path(), given.resolve().parent]
        places = [folder / (name.name if name.is_absolute() else name) for folder in folders]
        if name.is_absolute():
            places.insert(0, name)
        found = next((place for place in places if place.is_file()), places[0])
        if found.exists() and found.samefile(given):
            return node.file
        self._leave(place, verb, target)
        self._note(place, found)
        return self._file(found)

    def _leave(self, place: str, verb: str, target: str) -> None:
        if not self.follow_links:
            _refuse(self.path, place, verb, target)

    def _note(self, place: str, path: Path) -> None:
        if not path.is_file():
            raise DataError(f"{self.path}: {place} needs the file {path}, which is missing or no plain file")
        if path not in self.beside:
            self.beside.append(path)


def _refuse(path: Path, place: str, verb: str, target: str) -> NoReturn:
    raise DataError(
        f"{path}: {place} {verb} another file, {target}; if you trust this, allow it with follow_links=True"
    )


def hdf5_tree(path: Path, follow_links: bool = False) -> Tree:
    """Open an HDF5 file."""
    return _HDF5Tree(path, follow_links)


def zarr_tree(path: Path, follow_links: bool = False) -> Tree:
    """Open a zarr folder or zip file. `check_folder` has checked the links of a folder."""
    zarr = require("zarr", "anndata", "reading .zarr stores")
    if path.is_dir():
        return Tree(path, zarr.open_group(str(path), mode="r"), lambda: None)
    folder = _folder_in(path)
    store = zarr.storage.ZipStore(path, mode="r")
    return Tree(path, zarr.open_group(store, mode="r", path=folder), store.close)


def _folder_in(path: Path) -> str:
    """The folder of a zip file that holds the store: the top, or the only folder."""
    import zipfile

    marks = (".zgroup", "zarr.json")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(mark in names for mark in marks):
        return ""
    tops = {name.partition("/")[0] for name in names}
    found = [top for top in sorted(tops) if any(f"{top}/{mark}" in names for mark in marks)]
    if len(found) != 1:
        raise DataError(f"{path}: it must hold one zarr group, at the top or in one folder; it has {len(found)}")
    return found[0]


def check_folder(path: Path) -> None:
    """Raise `DataError` if a symbolic link below a folder leads out of it."""
    for name, file in files_of(path, follow=False):
        if file.is_symlink() and not file.resolve().is_relative_to(path.resolve()):
            _refuse(path, name, "is a link to", os.readlink(file))
