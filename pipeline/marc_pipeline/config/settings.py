"""The whole configuration: ``marc.yaml``, overridden by ``MARC_…`` variables; unknown keys are errors."""

import os
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from marc_pipeline.config.sections import (
    AuditSettings,
    CatalogueSettings,
    EncodeSettings,
    EvaluateSettings,
    IndexSettings,
    InteractionSettings,
    LayerSettings,
    RetentionSettings,
    SparkSettings,
    StorageSettings,
    TrainSettings,
)
from marc_pipeline.errors import UserError
from marc_pipeline.uris import absolute_uri, overlap
from marc_schemas.feature_table import MANTISSA_BITS

DEFAULT_CONFIG = "marc.yaml"
PREFIX = "MARC_"
CONFIG_VARIABLE = "MARC_CONFIG"
OUTPUT_URIS = ("table_uri", "index_uri", "work_uri", "bundle_uri")
# Errors never repeat the values of these sections, because they may contain secrets.
SECRET_SECTIONS = ("spark", "storage")


class Settings(BaseSettings):
    """The whole configuration. Relative paths are relative to the folder of the configuration file."""

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
        root = self.root.rstrip("/")
        for name in OUTPUT_URIS:
            object.__setattr__(self, name, getattr(self, name).replace("{root}", root))
        if self.interactions.uri is not None:
            uri = self.interactions.uri.replace("{root}", root)
            object.__setattr__(self, "interactions", self.interactions.model_copy(update={"uri": uri}))
        return self

    @model_validator(mode="after")
    def _require_tunable(self) -> "Settings":
        if self.train.regime == "tuned" and self.encode.long_texts == "pool":
            raise ValueError("train.regime tuned reads one chunk of every text: set encode.long_texts to cut")
        return self

    def resolved(self, folder: Path) -> "Settings":
        """Return the same settings with local uris made absolute against ``folder``.

        Raises:
            UserError: two folders of the pipeline overlap.
        """
        update: dict[str, Any] = {name: absolute_uri(getattr(self, name), folder) for name in ("root", *OUTPUT_URIS)}
        for name in ("catalogue", "interactions"):
            section = getattr(self, name)
            if section.uri is not None:
                update[name] = section.model_copy(update={"uri": absolute_uri(section.uri, folder)})
        found = self.model_copy(update=update)
        for name, other in combinations(OUTPUT_URIS, 2):
            if overlap(getattr(found, name), getattr(found, other)):
                raise UserError(
                    f"{name} and {other} overlap ({getattr(found, name)} and {getattr(found, other)}), so that a "
                    "vacuum of one could delete the other; give each a folder of its own"
                )
        return found

    def catalogue_uri(self, ds: str) -> str:
        """Return the uri of the catalogue of one date."""
        return self.catalogue.uri.format(ds=ds)


def config_path(given: str | Path | None = None) -> Path:
    """Return the absolute path of the configuration file, for the command line, the jobs and the scheduler.

    The order is: ``given``, the variable ``MARC_CONFIG``, ``marc.yaml`` in the working directory.
    """
    # Symbolic links are not resolved, because the paths in a mounted configuration are relative to the link.
    return Path(os.path.abspath(given or os.environ.get(CONFIG_VARIABLE) or DEFAULT_CONFIG))  # noqa: PTH100


def load_settings(given: str | Path | None = None) -> Settings:
    """Read the configuration file that :func:`config_path` finds, and the ``MARC_…`` variables, which override it.

    Raises:
        UserError: the file is missing or not YAML, or has an unknown key or a bad value; one line names the key.
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
            """Variables override the file."""
            return env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)

    try:
        return FileSettings().resolved(path.parent)
    except ValidationError as error:
        raise UserError(f"{path}: {describe(error)}") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a valid YAML mapping: {' '.join(str(error).split())}") from None


def _is_key(variable: str) -> bool:
    name = variable.removeprefix(PREFIX).split("__")[0].lower()
    return name in Settings.model_fields or variable == CONFIG_VARIABLE


def describe(error: ValidationError) -> str:
    """Return one line that names every bad key with its value and the rule that it breaks."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {key}")
        elif item["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            got = "" if key.startswith(SECRET_SECTIONS) else f" (got {item['input']!r})"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{got}")
    return "; ".join(lines)


def parse_ds(value: str) -> str:
    """Return ``value`` if it is a date like ``2026-11-20``.

    Raises:
        UserError: it is not.
    """
    try:
        parsed = date.fromisoformat(value)
    except ValueError:
        parsed = None
    if parsed is None or parsed.isoformat() != value:
        raise UserError(f"{value!r} is not a date; write YYYY-MM-DD, for example 2026-11-20")
    return value
