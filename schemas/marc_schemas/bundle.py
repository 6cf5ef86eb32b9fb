"""bundle.json: the card of a trained encoder and compressor."""

from typing import Any, Literal

from pydantic import Field

from marc_schemas.files import Contract, RelativePath

FORMAT_VERSION: Literal[1] = 1

Pooling = Literal["mean", "last", "cls"]


class CompressorCard(Contract):
    """Which compressor ``compressor.safetensors`` holds, and the arguments that build it."""

    kind: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class BundleCard(Contract):
    """Everything that is known of a bundle besides its weights.

    Attributes:
        backbone: name or path that the backbone was taken from (provenance; the weights are in the bundle).
        layers_kept: number of blocks of the truncated backbone; backbone_layers: of the original.
        pooling: how token states become one vector.
        max_tokens: longer texts are truncated, special tokens included.
        width: D, of the pooled hidden state; dim: d, of the shipped vector.
        normalised: whether shipped vectors have unit length.
        template: text template that the training texts were rendered with.
        compressor: kind and arguments.
        training: regime, data fingerprint, number of texts, seed.
        metrics: what training measured.
        files: SHA-256 of every other file of the folder, by relative path.
    """

    format_version: Literal[1] = FORMAT_VERSION
    backbone: str
    layers_kept: int = Field(ge=1)
    backbone_layers: int = Field(ge=1)
    pooling: Pooling
    max_tokens: int = Field(ge=2)
    width: int
    dim: int = Field(ge=1)
    normalised: bool
    template: str
    compressor: CompressorCard
    training: dict[str, Any]
    metrics: dict[str, float]
    files: dict[RelativePath, str]
