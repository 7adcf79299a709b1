"""``adapter_analysis.json``: what an adapter does for each task. Training writes it and reports read it."""

import dataclasses
from pathlib import Path

from mtl_lora import files
from mtl_lora.errors import UserError
from mtl_lora.results import Reader, Text, object_of

SCHEMA, KIND = 1, "adapter_analysis"
Matrix = list[list[float | None]]
# Key in the file -> what is compared, in words.
SIMILARITIES = {"lambda_similarity": "Λₜ", "lambda_minus_identity_similarity": "Λₜ − I"}
SIMILARITIES |= {"update_similarity": "update s Bₜ Aₜ", "update_similarity_at_start": "update, start's mixtures"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """The tasks' mixture weights in each adapted layer, and the similarity of the tasks over all layers.

    mixture: by layer, the (T, n) weights with which the tasks mix the parts named by ``mixture_parts``; None for a
    method without a mixture. Similarities are (T, T) cosines under the Frobenius inner product, averaged over layers:
    of Lambda_t, of Lambda_t - I, and of the updates scale * B_t A_t, the last also by adapted module. A similarity is
    None if it does not apply, as for a method that treats all tasks alike; an entry is None if it is undefined.
    ``at_start``: the initial mixture, and the updates of the trained A and B with the initial values of each task's own
    weights; None if the initial values were not kept.
    """

    method: Text
    method_title: str | None = None
    mixture_parts: str | None = None
    tasks: list[str]
    adapter_sha256: str | None = None
    layers: list[str]
    mixture: dict[str, Matrix] | None = None
    mixture_at_start: dict[str, Matrix] | None = None
    lambda_similarity: Matrix | None = None
    lambda_minus_identity_similarity: Matrix | None = None
    update_similarity: Matrix | None = None
    update_similarity_at_start: Matrix | None = None
    update_similarity_by_module: dict[str, Matrix] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> "Analysis":
        """Read the file; raises ``UserError`` that names it and the key that is wrong."""
        value, reader = files.read_object(path, "the adapter's analysis"), Reader(str(path))
        if value.get("kind") != KIND or value.get("schema") != SCHEMA:
            raise UserError(f"{path} is not an analysis of schema 1; write it with python -m mtl_lora.adapter.analysis")
        analysis = reader.read(cls, value)
        T, started = len(analysis.tasks), analysis.mixture_at_start
        if started is not None and started.keys() != (analysis.mixture or {}).keys():
            raise reader.wrong("mixture_at_start", [*started], "the layers of mixture")
        for key in ("mixture", "mixture_at_start", "update_similarity_by_module", *SIMILARITIES):
            found = getattr(analysis, key)
            for place, matrix in (found if isinstance(found, dict) else {"": found}).items():
                if matrix is None:
                    continue
                width = len(matrix[0]) if matrix and key.startswith("mixture") else T
                if [len(row) for row in matrix] != [width] * T:
                    rule = f"{T} rows of the same length, which is {T} for a similarity"
                    raise reader.wrong(f"{key}.{place}".rstrip("."), matrix, rule)
        return analysis

    def to_json(self) -> dict:
        """Return the content of the file."""
        return {"schema": SCHEMA, "kind": KIND, **object_of(self)}

    @property
    def similarities(self) -> dict[str, Matrix]:
        """The similarity matrices, by what they compare, in words."""
        return {words: matrix for key, words in SIMILARITIES.items() if (matrix := getattr(self, key))}
