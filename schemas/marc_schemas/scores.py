"""Benchmark scores of every layer of a model, and what follows from them."""

from typing import Annotated

from pydantic import Field, FiniteFloat

from marc_schemas.files import Contract

# Far beyond every model and every score: what exceeds them is a mistake, and nothing is to be counted up to it.
MOST_LAYERS, LARGEST_SCORE = 99_999, 1e9

LayerNumber = Annotated[int, Field(ge=0, le=MOST_LAYERS)]


class LayerScore(Contract):
    """The main score of one task on the vectors of one layer.

    Attributes:
        family: of the model, for example ``Pythia``.
        size: of the model in the family, for example ``410m``; empty where there is one size.
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
        tasks: that the layer has a score of.
        mean: over those.
        same_tasks_mean: over the tasks that all layers have which count; None for a layer that does not count.
    """

    layer: LayerNumber
    tasks: int
    mean: FiniteFloat
    same_tasks_mean: FiniteFloat | None


class Comparison(Contract):
    """The best layer beside the final one, of those layers that count.

    Attributes:
        layers: that were compared.
        final_layer: the highest of them; whether the model has higher ones, the scores do not say.
        final: its mean score, over ``final_tasks`` tasks.
        best_layer: that with the highest mean, the lowest of equals.
        best: its mean score, over ``best_tasks`` tasks.
        gain: ``best`` minus ``final``, never below 0.
        percent: the gain in percent of ``final``; None unless that is above 0.
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
    """The layer where a task's score is highest.

    Attributes:
        layer: the lowest of equals.
        layers: that have a score of the task.
        final: the task's score at the final layer that counts; None where it lacks it, as is ``gain``.
    """

    task: str
    layer: LayerNumber
    score: FiniteFloat
    layers: int
    final: FiniteFloat | None
    gain: Annotated[FiniteFloat, Field(ge=0)] | None


class ModelCurve(Contract):
    """One model: the mean score of each layer, and which one is best.

    A layer *counts* when it has at least 15 of 16 of the model's tasks.

    Attributes:
        tasks: of which any layer has a score.
        layers: those present, in order.
        complete: at least two layers, none absent between the lowest and the highest, and each has every task.
        absent_layers: between the lowest and the highest.
        partial_layers: that lack a task.
        missing_scores: of present layers.
        as_recorded: the comparison by what each layer has; where the layers' tasks differ, so does what the means are
            of. None when fewer than two layers count.
        same_tasks: the comparison by the tasks that every layer has which counts; None when there are no such tasks or
            layers. Of a complete model the same as ``as_recorded``.
        winners: by task, in the order of ``tasks``.
    """

    family: str
    size: str
    tasks: list[str]
    layers: list[LayerMean]
    complete: bool
    absent_layers: list[LayerNumber]
    partial_layers: list[LayerNumber]
    missing_scores: int
    as_recorded: Comparison | None
    same_tasks: Comparison | None
    winners: list[TaskWinner]

    @property
    def name(self) -> str:
        """Family and size."""
        return f"{self.family} {self.size}".strip()

    @property
    def highest_layer(self) -> int:
        """The highest layer that has any score."""
        return self.layers[-1].layer


class ScoreReport(Contract):
    """Every model that there are scores of, ordered by family and size.

    Attributes:
        tasks: of all models.
    """

    tasks: list[str]
    models: list[ModelCurve]
