"""The data frames `obs` and `var` of AnnData files, in every layout that anndata has written.

| layout | written by anndata |
| --- | --- |
| a group with an array or a group for each column | 0.8 and later |
| the same, with codes that refer to ``__categories`` | 0.7 |
| one table, with categories in ``uns/NAME_categories`` | 0.6 and earlier |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .columns import Column
from .formats import reading
from .tree import Tree, is_group, text_attribute

__all__ = ["Frame", "StoredColumns", "attributes_frame", "plain"]


class Frame:
    """One data frame in a file; nothing but the names of its columns is read until it is asked for."""

    def __init__(self, tree: Tree, root: Any, name: str) -> None:
        self._tree, self._root, self._name = tree, root, name
        self._node = tree.child(root, name)
        self._is_table = not is_group(self._node)
        if self._is_table and not self._node.dtype.names:
            raise DataError(f"{tree.where(self._node)} is not a data frame")

    @cached_property
    def names(self) -> list[str]:
        """The names of the columns, in their order."""
        if self._is_table:
            return list(self._node.dtype.names[1:])
        if "column-order" in self._node.attrs:
            order = self._node.attrs["column-order"]
            return [name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(order).tolist()]
        return sorted(set(self._node) - {"__categories", self._index_name})

    @cached_property
    def _index_name(self) -> str:
        if self._is_table:
            return str(self._node.dtype.names[0])
        name = text_attribute(self._node, "_index")
        found = [each for each in (name, "_index", "index") if each and self._tree.find(self._node, each) is not None]
        if not found:
            missing = "it lacks the attribute _index" if name is None else f"its index {name!r} is missing"
            raise DataError(f"{self._tree.where(self._node)} has no index: {missing}")
        return found[0]

    def index(self) -> npt.NDArray[np.str_]:
        """The names of the rows."""
        column = self._read(self._index_name)
        names = column.decoded().astype(str)
        return np.where(column.missing, "nan", names) if column.missing.any() else names

    def column(self, name: str) -> Column:
        return self._read(name)

    def visit_links(self) -> None:
        """Find every array of the frame, so that the tree knows all files that links lead to."""

        def visit(group: Any) -> None:
            for name in group:
                node = self._tree.find(group, name)
                if is_group(node):
                    visit(node)

        if self._tree.follow_links and not self._is_table:
            visit(self._node)

    def _read(self, name: str) -> Column:
        if not self._is_table:
            return column(self._tree, self._node, self._tree.child(self._node, name))
        values = plain(self._rows[name], f"{self._tree.where(self._node)}/{name}")
        stored = self._tree.find(self._root, f"uns/{name}_categories") if values.dtype.kind in "iu" else None
        if stored is None or is_group(stored):
            return Column(values)
        categories = plain(np.atleast_1d(stored[()]), self._tree.where(stored))
        if values.max(initial=-1) >= len(categories):  # anndata: the categories of a column of `var` by that name
            return Column(values)
        return _categorical(values, categories, False, self._tree.where(stored))

    @cached_property
    def _rows(self) -> Any:
        return self._node[()]


def column(tree: Tree, frame: Any, node: Any) -> Column:
    """A column from its node below the group of a frame."""
    where = tree.where(node)
    if is_group(node):
        parts = set(node)  # `in` would already follow a link
        if "categories" in parts:
            codes = _vector(tree, tree.child(node, "codes"))
            stored = tree.child(node, "categories")
            categories = column(tree, node, stored) if is_group(stored) else Column(_vector(tree, stored))
            return _categorical(codes, categories.decoded(), bool(node.attrs.get("ordered", False)), where)
        if "mask" in parts:
            values, mask = (_vector(tree, tree.child(node, name)) for name in ("values", "mask"))
            if mask.shape != values.shape:
                raise DataError(f"{where}: damaged: {len(values)} values but {len(mask)} in the mask")
            return Column(values, mask.astype(bool))
        kind = text_attribute(node, "encoding-type") or "a group"
        raise DataError(f"{where} is stored as {kind}, not as a column of numbers, text or categories")
    if "categories" in node.attrs:
        stored = tree.referred(node, node.attrs["categories"], frame)
        ordered = bool(stored.attrs.get("ordered", False))
        return _categorical(_vector(tree, node), _vector(tree, stored), ordered, where)
    return Column(_vector(tree, node))


def _vector(tree: Tree, node: Any) -> npt.NDArray[Any]:
    where = tree.where(node)
    if is_group(node) or not hasattr(node, "shape") or len(node.shape) != 1:
        raise DataError(f"{where}: one value per row is needed, it has shape {getattr(node, 'shape', 'of a group')}")
    return plain(node[:], where)


def plain(values: Any, where: str) -> npt.NDArray[Any]:
    """Numbers and booleans as they are; text as strings."""
    array = np.asarray(values)
    if array.dtype.kind in "biuf":
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind not in "OSTU":
        raise DataError(f"{where}: numbers or text expected, got dtype {array.dtype}")
    try:
        texts = [value.decode() if isinstance(value, bytes) else str(value) for value in array.tolist()]
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: text that is not UTF-8 ({error.object[:20]!r})") from None
    return np.asarray(texts, dtype=str)


def _categorical(codes: npt.NDArray[Any], categories: npt.NDArray[Any], ordered: bool, where: str) -> Column:
    if codes.dtype.kind not in "iu":
        raise DataError(f"{where}: damaged: the codes of categories are {codes.dtype}")
    bad = (codes >= len(categories)) | ((codes < -1) if codes.dtype.kind == "i" else False)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"{where}: damaged: row {row} has category {codes[row]} of {len(categories)}")
    return Column(codes.astype(np.int64), None, categories, ordered)


def attributes_frame(tree: Tree, group: Any) -> dict[str, Any]:
    """The arrays of a group of a loom file with one value per row or column, by name."""
    return {
        name: node
        for name in sorted(group)
        if (node := tree.find(group, name)) is not None and not is_group(node) and len(node.shape) == 1
    }


class StoredColumns(Mapping[str, Column]):
    """The columns of `obs` of a file, each read when it is looked up. The file is opened for that alone.

    Parameters
    ----------
    path : Path
    names : list of str
    opened : callable
        Opens the file.
    read : callable
        ``read(tree, name)`` returns a column.
    """

    def __init__(
        self, path: Path, names: list[str], opened: Callable[[], Tree], read: Callable[[Tree, str], Column]
    ) -> None:
        self._path, self._names = path, dict.fromkeys(names)
        self._opened, self._read = opened, read

    def __getitem__(self, name: str) -> Column:
        if name not in self._names:
            raise KeyError(name)
        with reading(self._path, f"column {name!r} of obs"), closing(self._opened()) as tree:
            return self._read(tree, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
