"""Configuration: ``marc.yaml`` and the ``MARC_…`` variables as typed settings."""

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
from marc_pipeline.config.settings import (
    CONFIG_VARIABLE,
    DEFAULT_CONFIG,
    Settings,
    config_path,
    describe,
    load_settings,
    parse_ds,
)

__all__ = [
    "CONFIG_VARIABLE",
    "DEFAULT_CONFIG",
    "AuditSettings",
    "CatalogueSettings",
    "EncodeSettings",
    "EvaluateSettings",
    "IndexSettings",
    "InteractionSettings",
    "LayerSettings",
    "RetentionSettings",
    "Settings",
    "SparkSettings",
    "StorageSettings",
    "TrainSettings",
    "config_path",
    "describe",
    "load_settings",
    "parse_ds",
]
