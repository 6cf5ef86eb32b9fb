"""Benchmark scores of every layer of a model, their means, and the best layers."""

from typing import Annotated

from pydantic import Field, FiniteFloat

from marc_schemas.files import Contract

# Limits far above every real model and score; a larger value is a mistake in the file.
MOST_LAYERS, LARGEST_SCORE = 99_999, 1e9

LayerNumber = Annotated[int, Field(ge=0, le=MOST_LAYERS)]


class LayerScore(Contract):
    """The main score of one task on the vectors of one layer.

    Attributes:
        family: family of the model, for example ``Pythia``.
        size: size of the model, for example ``410m``; empty if the family has one size.
        layer: block whose states were pooled, 0 for the embeddings.
        task: name of the task.
        score: the task's main score; higher is better.
    """

    family: str
    size: str
    layer: LayerNumber
    task: str
    score: Annotated[FiniteFloat, Field(ge=-LARGEST_SCORE, le=LARGEST_SCORE)]


class LayerMean(Contract):
    """The mean score of one layer.

    Attributes:
        tasks: number of tasks with a score of this layer.
        mean: mean score over these tasks.
        same_tasks_mean: mean score over the tasks that all counted layers have; None for a layer that does not count.
    """

    layer: LayerNumber
    tasks: int
    mean: FiniteFloat
    same_tasks_mean: FiniteFloat | None


class LayerComparison(Contract):
    """Comparison of the best layer with the final one, among the layers that count.

    Attributes:
        layers: number of compared layers.
        final_layer: highest compared layer; the model may have higher layers without scores.
        final: mean score of the final layer, over ``final_tasks`` tasks.
        best_layer: layer with the highest mean; the lowest of equal ones.
        best: mean score of the best layer, over ``best_tasks`` tasks.
        gain: ``best`` minus ``final``, at least 0.
        percent: gain in percent of ``final``; None unless ``final`` is above 0.
    """

    layers: int
    final_layer: LayerNumber
    final: FiniteFloat
    final_tasks: int
    best_layer: LayerNumber
    best: FiniteFloat
    best_tasks: int
    gain: Annotated[FiniteFloat, Field(ge=0)]
    percent: FiniteFloat | None


class TaskWinner(Contract):
    """The layer with the highest score of a task.

    Attributes:
        layer: the best layer; the lowest of equal ones.
        layers: number of layers with a score of the task.
        final: score of the final layer that counts; None, as is ``gain``, if that layer has no score of the task.
    """

    task: str
    layer: LayerNumber
    score: FiniteFloat
    layers: int
    final: FiniteFloat | None
    gain: Annotated[FiniteFloat, Field(ge=0)] | None


class ModelCurve(Contract):
    """Mean score of each layer of one model, and the best layer.

    A layer *counts* if it has scores of at least 15 of 16 of the model's tasks.

    Attributes:
        tasks: tasks with a score of any layer.
        layers: layers with scores, in order.
        complete: whether there are at least two layers, without a gap, and each has a score of every task.
        absent_layers: layers without scores between the lowest and the highest layer.
        partial_layers: layers that lack scores of some tasks.
        missing_scores: number of missing scores of the layers with scores.
        as_recorded: comparison by all scores of each layer, whose tasks may differ; None if fewer than two layers
            count.
        same_tasks: comparison by the tasks that all counted layers have; None without such tasks or layers. For a
            complete model it equals ``as_recorded``.
        winners: best layer of each task, in the order of ``tasks``.
    """

    family: str
    size: str
    tasks: list[str]
    layers: list[LayerMean]
    complete: bool
    absent_layers: list[LayerNumber]
    partial_layers: list[LayerNumber]
    missing_scores: int
    as_recorded: LayerComparison | None
    same_tasks: LayerComparison | None
    winners: list[TaskWinner]

    @property
    def name(self) -> str:
        """Family and size."""
        return f"{self.family} {self.size}".strip()

    @property
    def highest_layer(self) -> int:
        """The highest layer with a score."""
        return self.layers[-1].layer


class ScoreReport(Contract):
    """All models with scores, ordered by family and size; ``tasks`` are the tasks of all models."""

    tasks: list[str]
    models: list[ModelCurve]
