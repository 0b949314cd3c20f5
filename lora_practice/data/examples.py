"""Many examples in little memory: flat arrays of 8 bytes per token that `datasets` reads without a copy."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from lora_practice.data.tokenization import IGNORE_INDEX, Example


class Examples(Sequence[Example]):
    """A read-only sequence of examples. A million short rows take about 0.5 GB; as lists they would take 3 GB.

    `ids` and `labels` are the rows one after another as int32; row i is [starts[i], starts[i + 1]).
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self.ids, self.labels, self.starts = array("i"), array("i"), array("i", [0])
        for example in examples:
            self.ids.extend(example.input_ids)
            self.labels.extend(example.labels)
            self.starts.append(len(self.ids))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]  # negative indices, and IndexError at the end
        start, end = self.starts[row], self.starts[row + 1]
        return Example(self.ids[start:end].tolist(), self.labels[start:end].tolist())

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that have a loss: labelled, and not the first of their row."""
        import numpy as np

        labelled = np.frombuffer(self.labels, dtype=np.int32) != IGNORE_INDEX
        firsts = labelled[np.frombuffer(self.starts, dtype=np.int32)[:-1]]
        return int(labelled.sum() - firsts.sum())

    @property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return max((end - start for start, end in zip(self.starts, self.starts[1:])), default=0)

    def fingerprint(self) -> str:
        """SHA-256 of all tokens, labels and row starts: equal only for the same training set."""
        digest = hashlib.sha256()
        for values in (self.starts, self.ids, self.labels):
            digest.update(memoryview(values).cast("B"))
        return digest.hexdigest()

    def dataset(self) -> Any:
        """A `datasets.Dataset` with columns input_ids and labels that shares these arrays."""
        import pyarrow as pa
        from datasets import Dataset

        starts = pa.Array.from_buffers(pa.int32(), len(self.starts), [None, pa.py_buffer(self.starts)])
        columns = {}
        for name, values in (("input_ids", self.ids), ("labels", self.labels)):
            flat = pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
            columns[name] = pa.ListArray.from_arrays(starts, flat)
        return Dataset(
            pa.table(columns), fingerprint="examples"
        )  # without a fingerprint `datasets` would hash every token
