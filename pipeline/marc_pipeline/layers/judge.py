"""Layer reports: metrics of every layer over a sample, AUC from clicks, and a recommendation to adopt."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.bundles.choices import adopted_uri, reviewed, with_train
from marc_pipeline.bundles.stages import fold_scores, run_id, states_stage, tested_layers
from marc_pipeline.catalogue.rows import sample_texts
from marc_pipeline.catalogue.source import CatalogueSource, find_source
from marc_pipeline.config import Settings, TrainSettings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.layers.findings import INPUTS_PER_UNIT, is_chance, layer_findings, recommend, with_choice
from marc_pipeline.storage import Storage, StoredObject, is_s3, join
from marc_pipeline.training.training_set import TrainingIdentity, backbone_files, identify_training, require_announced
from marc_pipeline.work_area import read_contract
from marc_schemas.identity import digest
from marc_schemas.layers import Adopted, JudgedLayer, JudgedModel, LayerReport

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from marc_pipeline.layers.sweep import SweepPart

FORMAT_VERSION = 1
REPORT = "layers.json"
SWEPT = "sweep.json"
MOST_PARTS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Candidate:
    """One backbone with one pooling, and the data for its evaluation."""

    deployment: Deployment
    identity: TrainingIdentity | None
    source: CatalogueSource | None
    images: tuple[str, ...]
    sweep_id: str

    @property
    def settings(self) -> Settings:
        return self.deployment.settings

    @property
    def train(self) -> TrainSettings:
        return self.settings.train

    @property
    def uri(self) -> str:
        return join(self.settings.work_uri, "layers", self.sweep_id)

    @property
    def swept_uri(self) -> str:
        """The merged metrics of all parts; written once every part is done."""
        return join(self.uri, SWEPT)


def judge_layers(
    deployment: Deployment,
    *,
    ds: str = "",
    images: str = "",
    backbones: Sequence[str] = (),
    poolings: Sequence[str] = (),
    expected: str | None = None,
) -> LayerReport:
    """Evaluate every layer of one or several models on a catalogue, with its interactions if there are any.

    A report is computed once; a second call reads it.

    Args:
        deployment: settings and storage.
        ds: date of the catalogue.
        images: folder of images that every machine of the cluster can read, instead of ``ds``.
        backbones: backbones to compare; default: the configured one.
        poolings: poolings of each backbone; default: the configured or the adopted one.
        expected: training_id that an earlier task of the same run announced.

    Raises:
        UserError: catalogue, interactions, backbone or settings are not valid, or they changed since that task.
    """
    from marc_pipeline.layers.sweep import require_kind
    from marc_pipeline.spark.session import configured_session
    from marc_pipeline.training.training_set import require_interactions

    settings, storage = deployment.settings, deployment.storage
    if bool(ds) == bool(images):
        raise UserError("layers are evaluated on the catalogue of a date or on a folder of images: give one of the two")
    paths = _image_paths(images, settings.layers.sample) if images else ()
    candidates = _candidates(deployment, ds=ds, images=paths, backbones=backbones, poolings=poolings)
    for candidate in candidates:
        if expected is not None and candidate.identity is not None:
            require_announced(candidate.identity, expected)
    report_id = _report_id(candidates, ds)
    uri = join(report_folder(settings, report_id), REPORT)
    done = read_contract(storage, uri, LayerReport)
    if done is not None:
        log.info("layers: report %s exists already", report_id)
        return done
    for backbone in dict.fromkeys(candidate.train.backbone for candidate in candidates):
        require_kind(backbone, images=bool(images))
    if (identity := candidates[0].identity) is not None:  # the candidates have the same interactions
        require_interactions(candidates[0].deployment, identity)
    with configured_session(settings, name=f"marc layers {ds or images}", gpu_tasks=True) as spark:
        models, inputs = _sweep(spark, deployment, candidates, ds=ds)
    models = [_chosen(candidate, model) for candidate, model in zip(candidates, models, strict=True)]
    report = LayerReport(
        report_id=report_id,
        kind="images" if images else "texts",
        ds=ds,
        dim=settings.train.dim if candidates[0].identity else 0,
        **settings.layers.model_dump(exclude={"seed", "sample"}),
        sample=inputs,
        models=models,
        recommendations=recommend(models),
        findings=layer_findings(models),
    )
    storage.write(uri, report.model_dump_json(indent=1).encode())
    return report


def require_adoptable(settings: Settings, *, backbones: Sequence[str], images: str) -> None:
    """Check before the work starts that trainings would use the adopted recommendation.

    Raises:
        UserError: trainings use another backbone or configured layers, or the report is on images.
    """
    train = settings.train
    if images:
        raise UserError("a recommendation from images cannot be adopted: trainings read texts")
    if backbones and train.backbone not in backbones:
        raise UserError(
            f"trainings use train.backbone {train.backbone!r}: evaluate that backbone, or configure another one first"
        )
    if train.layers is not None:
        raise UserError(
            f"train.layers is configured as {train.layers} and takes precedence: remove it to adopt another"
        )


def adopt(deployment: Deployment, report: LayerReport) -> Adopted:
    """Make a recommendation the default of trainings with the configured backbone, in one atomic write.

    Raises:
        UserError: the report has no recommendation for that backbone.
    """
    settings = deployment.settings
    found = [one for one in report.recommendations if one.backbone == settings.train.backbone]
    if not found:
        raise UserError(
            f"report {report.report_id} has no recommendation for train.backbone {settings.train.backbone!r}; its "
            "findings say why"
        )
    now = datetime.now(UTC)
    record = Adopted(recommendation=found[0], report_id=report.report_id, ds=report.ds, adopted_at=now)
    deployment.storage.write(adopted_uri(settings), record.model_dump_json(indent=1).encode())
    log.info("layers: adopted %d layers with %s pooling", record.recommendation.layers, record.recommendation.pooling)
    return record


def report_folder(settings: Settings, report_id: str) -> str:
    """Return the folder of a report in the work area."""
    return join(settings.work_uri, "layers", "reports", report_id)


def publish_report(deployment: Deployment, report: LayerReport) -> str:
    """Write pages and plots of a report beside its JSON in the work area, and return the uri of the folder."""
    from marc_pipeline.layers.report import write_layer_report

    storage, uri = deployment.storage, report_folder(deployment.settings, report.report_id)
    with TemporaryDirectory(prefix="marc-layers-") as name:
        for file in write_layer_report(report, Path(name)):
            storage.write(join(uri, file.name), file.read_bytes())
    log.info("layers: report at %s", uri)
    return uri


def _candidates(
    deployment: Deployment,
    *,
    ds: str,
    images: tuple[str, ...] = (),
    backbones: Sequence[str] = (),
    poolings: Sequence[str] = (),
) -> list[_Candidate]:
    settings, storage, source = deployment.settings, deployment.storage, None
    if not images:
        source = find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    found = []
    for backbone in dict.fromkeys(backbones or (settings.train.backbone,)):
        configured = deployment.with_settings(with_train(settings, {"backbone": backbone}))
        usual = reviewed(configured)[0].settings.train.pooling
        for pooling in dict.fromkeys(poolings or (usual,)):
            # The layers that trainings keep at present must not influence the recommendation.
            train = with_train(settings, {"backbone": backbone, "pooling": pooling}).train
            open_train = train.model_copy(update={"layers": None})
            own = deployment.with_settings(settings.model_copy(update={"train": open_train}))
            identity = identify_training(own, ds=ds) if source and settings.interactions.uri is not None else None
            inputs = _inputs(own, identity, source, images)
            found.append(_Candidate(own, identity, source, images, _sweep_id(own.settings, inputs)))
    return found


def _inputs(
    deployment: Deployment, identity: TrainingIdentity | None, source: CatalogueSource | None, images: tuple[str, ...]
) -> list[object]:
    """Everything that identifies the texts or images of an evaluation."""
    if identity is not None:
        return [identity.training_id]
    if source is not None:
        wanted = deployment.settings.catalogue
        files = sorted(file.digest for file in source.files)
        return [files, source.format, wanted.id_column, wanted.updated_at_column, wanted.rendering]
    return [[path, deployment.storage.content_digest(StoredObject(uri=path, bytes=0))] for path in images]


def _sweep_id(settings: Settings, inputs: list[object]) -> str:
    train = settings.train
    parts = [
        FORMAT_VERSION, inputs, train.backbone, backbone_files(train.backbone), train.pooling, train.max_tokens,
        settings.encode.dtype, settings.layers.model_dump(),
    ]  # fmt: skip
    return digest(parts, chars=16)


def _image_paths(folder: str, limit: int) -> tuple[str, ...]:
    """Images below a folder; of more than ``limit``, a sample that the hashes of their paths determine."""
    from marc_pipeline.layers.image_files import image_files

    if is_s3(folder):
        raise UserError(f"{folder}: images are not read from S3; copy them to a folder that all workers can read")
    root = Path(folder).absolute()
    names = sorted((path.relative_to(root).as_posix() for path in image_files(root)), key=_hashed)
    if len(names) < 2:
        raise UserError(f"{folder} has {len(names)} images; an evaluation of layers needs at least 2")
    return tuple(str(root / name) for name in names[:limit])


def _report_id(candidates: Sequence[_Candidate], ds: str) -> str:
    clicks = [
        one.identity and [run_id(one.settings, one.identity.training_id), one.settings.evaluate.seeds]
        for one in candidates
    ]
    return digest([ds, [one.sweep_id for one in candidates], clicks], chars=16)


def _sweep(
    spark: "SparkSession", deployment: Deployment, candidates: Sequence[_Candidate], *, ds: str
) -> tuple[list[JudgedModel], int]:
    """The metrics of every layer of every candidate, in parallel parts; and the number of inputs."""
    from marc_pipeline.layers.sweep import INPUT, SAMPLE, run_part
    from marc_pipeline.spark.tasks import run_buckets

    settings, storage = deployment.settings, deployment.storage
    first, wanted = candidates[0], settings.layers
    inputs: list[str] = list(first.images)
    for candidate in candidates:
        if candidate.identity is not None:
            made = states_stage(spark, candidate.deployment, candidate.identity, dims=(candidate.train.dim,))
            inputs = inputs or _some(made.texts, wanted.sample)
    if first.source is not None and first.identity is None:
        inputs = sample_texts(spark, first.source, settings.catalogue, storage=storage, limit=wanted.sample)
    if len(inputs) < 2:
        raise UserError(
            f"the catalogue of {ds} has {len(inputs)} distinct texts; an evaluation of layers needs at least 2"
        )
    parts: dict[str, list[SweepPart]] = {}
    for candidate in candidates:
        if storage.stat(candidate.swept_uri) is None:
            with storage.staged(join(candidate.uri, SAMPLE)) as staged:
                pq.write_table(pa.table({INPUT: inputs}), staged)
                storage.publish(staged, join(candidate.uri, SAMPLE))
            parts[candidate.sweep_id] = _parts(candidate, len(inputs), storage=storage)
    run_buckets(
        spark,
        run_part,
        [part for own in parts.values() for part in own],
        label="layer metrics",
        weight=lambda part: part.inputs,
        unit="images" if first.images else "texts",
        each="parts",
    )
    swept = [_swept(candidate, parts.get(candidate.sweep_id, ()), storage=storage) for candidate in candidates]
    return swept, len(inputs)


def _swept(candidate: _Candidate, parts: "Sequence[SweepPart]", *, storage: Storage) -> JudgedModel:
    """Read the merged metrics of a candidate, or merge its parts and delete them."""
    from marc_pipeline.layers.sweep import merge_parts

    done = read_contract(storage, candidate.swept_uri, JudgedModel)
    if done is not None:
        return done
    log.info("layer metrics: merging %d parts of %s", len(parts), candidate.train.backbone)
    try:
        facts, metrics = merge_parts(parts)
    except FileNotFoundError:
        # Another run of the same sweep has merged and deleted the parts.
        done = read_contract(storage, candidate.swept_uri, JudgedModel)
        if done is None:
            raise
        return done
    seconds = np.cumsum(facts.seconds) / facts.inputs * INPUTS_PER_UNIT
    shared = {name: getattr(facts, name) for name in JudgedModel.model_fields if hasattr(facts, name)}
    model = JudgedModel(
        sweep_id=candidate.sweep_id,
        backbone=candidate.train.backbone,
        pooling=candidate.train.pooling,
        **shared,
        judged=[
            JudgedLayer(
                layer=layer,
                depth=layer / facts.layers,
                metrics=figures,
                seconds=float(seconds[layer]),
                weights_bytes=facts.weights_bytes[layer],
            )
            for layer, figures in enumerate(metrics)
        ],
    )
    storage.write(candidate.swept_uri, model.model_dump_json(indent=1).encode())
    storage.remove(part.file for part in parts)
    return model


def _parts(candidate: _Candidate, inputs: int, *, storage: Storage) -> "list[SweepPart]":
    """Distribute blocks of nearly equal size to parts, in the same way on every machine."""
    from marc_pipeline.layers.sweep import SweepPart

    settings = candidate.settings
    count = -(-inputs // settings.layers.block)
    bounds = np.linspace(0, inputs, count + 1).astype(int).tolist()
    blocks = [(number, *bounds[number : number + 2]) for number in range(count)]
    return [
        SweepPart(
            storage=storage,
            uri=candidate.uri,
            number=number,
            blocks=tuple(blocks[number::MOST_PARTS]),
            train=settings.train,
            encode=settings.encode,
            layers=settings.layers,
            images=bool(candidate.images),
        )
        for number in range(min(count, MOST_PARTS))
    ]


def _chosen(candidate: _Candidate, model: JudgedModel) -> JudgedModel:
    """Add the AUC of every layer, if there are interactions, and the layer to keep."""
    from marc_pipeline.evaluation.layer_search import RANDOM

    if candidate.identity is None:
        return with_choice(model)
    training_id = candidate.identity.training_id
    folds, tested = fold_scores(candidate.deployment, training_id), tested_layers(candidate.deployment, training_id)
    judged = [
        layer.model_copy(update={"test_auc": tested.get(layer.layer, []), "fold_auc": folds.get(layer.layer, [])})
        for layer in model.judged
    ]
    judged_model = model.model_copy(update={"judged": judged, "random_auc": folds[RANDOM]})
    if is_chance(judged_model):
        named = (model.backbone, model.pooling)
        log.warning(
            "layers: no vector of %s with %s pooling beats random ones: the texts say nothing about what users take",
            *named,
        )
    # LoRA needs a layer to tune.
    return with_choice(judged_model, least=1 if candidate.train.regime == "tuned" else 0)


def _some(texts: Sequence[str], limit: int) -> list[str]:
    """Distinct texts; of more than ``limit``, a sample by hash. Equal texts give equal samples."""
    return sorted(set(texts), key=_hashed)[:limit]


def _hashed(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
