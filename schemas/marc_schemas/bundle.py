"""bundle.json: the card of a trained encoder and compressor."""

from typing import Any, Literal

from pydantic import Field

from marc_schemas.files import Contract, RelativePath

FORMAT_VERSION: Literal[1] = 1

Pooling = Literal["mean", "last", "cls"]

LongTexts = Literal["cut", "pool"]
"""What happens to a text beyond ``max_tokens``: its end is cut off, or the states of its chunks are pooled."""


class CompressorCard(Contract):
    """Kind of the compressor in ``compressor.safetensors``, and the arguments that build it."""

    kind: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class BundleCard(Contract):
    """All facts of a bundle except the weights.

    Attributes:
        backbone: name or path of the original backbone; its weights are in the bundle.
        layers_kept: number of blocks that are computed, 0 for the embeddings alone.
        backbone_layers: number of blocks of the original backbone.
        pooling: how token states become one vector.
        max_tokens: longest input of the model in tokens, special tokens included.
        long_texts: whether training texts beyond ``max_tokens`` were cut or pooled.
        width: dimension D of the pooled hidden state.
        dim: dimension d of the published vectors.
        normalised: whether published vectors have unit length.
        template: text template of the training texts, with the version of the cleaning rules.
        compressor: kind and arguments.
        training: regime, data fingerprint, number of texts, seed.
        metrics: measurements of the training.
        files: SHA-256 of every other file of the folder, by relative path.
    """

    format_version: Literal[1] = FORMAT_VERSION
    backbone: str
    layers_kept: int = Field(ge=0)
    backbone_layers: int = Field(ge=1)
    pooling: Pooling
    max_tokens: int = Field(ge=2)
    long_texts: LongTexts = "cut"
    width: int
    dim: int = Field(ge=1)
    normalised: bool
    template: str
    compressor: CompressorCard
    training: dict[str, Any]
    metrics: dict[str, float]
    files: dict[RelativePath, str]
